"""Files that have the same text."""

import hashlib

from folio.corpus.corpus import Corpus
from folio.corpus.reading import read_text

LIMIT = 1 << 28  # bytes of all files; larger corpora are not searched


def find(corpus: Corpus) -> list[list[str]]:
    """Return the groups of .txt files that have the same text, apart from white space.

    The names are relative to the folder. Raises UserError if a file cannot be read.
    """
    texts = [file for file in corpus.files if file.kind == "txt"]
    if len(texts) < 2 or corpus.size > LIMIT:
        return []
    names: dict[str, list[str]] = {}
    for file in texts:
        digest = hashlib.sha256()
        for chunk in read_text(file, 0, None):
            digest.update("".join(chunk.split()).encode())
        name = file.name.removeprefix(f"{corpus.name}/")
        names.setdefault(digest.hexdigest(), []).append(name)
    names.pop(hashlib.sha256().hexdigest(), None)  # files without text
    return [group for group in names.values() if len(group) > 1]
