"""Files that have the same text."""

from folio.corpus import corpus, repeated


def test_files_with_the_same_text_are_named(tmp_path):
    raw = tmp_path / "data/raw"
    texts = {
        "a.txt": "one two\nthree\n",
        "b/a.txt": "\ufeffone two\r\nthree",  # the same apart from white space
        "c.txt": "another text",
        "d.txt": "one  two three",
        "e.txt": "another text",
        "empty.txt": "",
        "blank.txt": " \n",
    }
    for name, text in texts.items():
        (raw / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / "set" / name).write_bytes(text.encode())
    found = repeated.find(corpus.find("data/raw/set", tmp_path))
    assert found == [["a.txt", "b/a.txt", "d.txt"], ["c.txt", "e.txt"]]
