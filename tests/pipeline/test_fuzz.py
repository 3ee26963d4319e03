"""Random files are either read correctly or rejected with a clear error of one line.

hypothesis looks for counterexamples. The suite tries the same cases every time.
`FUZZ_CASES=20 pytest -n 0 tests/pipeline/test_fuzz.py` tries 20 times as many, and others every
time; benchmarks/fuzz.py does so and prints a table.
"""

import collections
import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
import yaml
from dvc.utils.hydra import apply_overrides
from dvc.utils.serialize import parse_yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from folio import params, plots, strict_yaml
from folio.corpus import corpus, folder, statistics, tasks
from folio.corpus import plots as corpus_plots
from folio.corpus.params import PrepareParams
from folio.errors import UserError
from folio.gpt import huggingface
from folio.gpt.model import GPT, ModelParams
from folio.inference.evaluation import EvaluateParams
from folio.runtime import RuntimeParams
from folio.sweeps import overrides, variants
from folio.tokens import token_files, token_meta, tokenizer
from folio.training import checkpoint
from folio.training.checkpoint import Checkpoint
from folio.training.params import TrainParams
from stages import prepare

set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")  # for its caches

FACTOR = os.environ.get("FUZZ_CASES")
CASES: collections.Counter[str] = collections.Counter()  # cases that ran, by test

ROOT = Path(__file__).parent.parent.parent
SHIPPED = (ROOT / "params.yaml").read_bytes()
TREE = yaml.safe_load(SHIPPED)
SECTIONS = {
    "prepare": PrepareParams,
    "model": ModelParams,
    "train": TrainParams,
    "evaluate": EvaluateParams,
    "runtime": RuntimeParams,
}
KEYS = [(name, field.name) for name, cls in SECTIONS.items() for field in dataclasses.fields(cls)]


def fuzz(cases: int, **strategies: st.SearchStrategy) -> Callable:
    """Run a test on this number of cases times FUZZ_CASES, each with newly drawn arguments."""

    def decorate(test: Callable) -> Callable:
        @settings(
            max_examples=round(cases * float(FACTOR or 1)),
            deadline=None,
            database=None,
            derandomize=FACTOR is None,
            suppress_health_check=list(HealthCheck),
        )
        @given(**strategies)
        @functools.wraps(test)
        def counted(**drawn: Any) -> None:
            CASES[test.__name__] += 1
            test(**drawn)

        return counted

    return decorate


@contextlib.contextmanager
def empty_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def assert_one_line(error: UserError, *names: object) -> None:
    """Assert that an error is one printable line that contains these names."""
    text = str(error)
    assert text.isprintable() and 10 < len(text) < 1_000, text
    for name in names:
        assert str(name) in text, text


# --- strategies

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, -1, 2**31, 2**63 - 1, 2**63, 10**12, 10**400])
    | st.floats()
    | st.text(max_size=20)
)
TREES = st.recursive(
    SCALARS,
    lambda tree: (
        st.lists(tree, max_size=4) | st.dictionaries(st.text(max_size=8), tree, max_size=4)
    ),
    max_leaves=6,
)
# Without lone surrogates, which UTF-8 cannot encode.
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.tuples(
        st.sampled_from(
            [*" \n\r\t\0\x1c\x85aZ9'!$\\_^{}", "\u2028", "\u0301", "\ufeff", "中", "🙂"]
        ),
        st.integers(1, 300),
    ),
    max_size=8,
).map(lambda runs: "".join(character * times for character, times in runs))
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "overwrite", "insert", "remove", "cut", "double"]),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=3,
)


def damage(content: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    """Change the content at some positions, each given as a fraction of its length."""
    for kind, fraction, new in edits:
        at = int(fraction * len(content))
        before, after = content[:at], content[at:]
        if kind == "flip":
            after = bytes([after[0] ^ (1 << new[0] % 8)]) + after[1:] if after else b""
        elif kind == "overwrite":
            after = new + after[len(new) :]
        elif kind == "insert":
            after = new + after
        elif kind == "remove":
            after = after[new[0] :]
        elif kind == "cut":
            after = b""
        elif kind == "double":
            after = after[: new[0]] + after
        content = before + after
    return content


# --- params.yaml and variants


def load_params(content: bytes) -> dict[str, Any] | None:
    """The params as {"train.steps": ...}, or None if they were rejected with printable lines."""
    with empty_folder() as folder:
        path = folder / "params.yaml"
        path.write_bytes(content)
        try:
            loaded = params.load(path, **SECTIONS)
        except UserError as error:
            assert str(error).startswith(str(path))
            for line in str(error).split("\n  "):
                assert line.isprintable() and len(line) < 1_000, line
            return None
    return params.flatten(**dict(zip(SECTIONS, loaded, strict=True)))


@fuzz(
    300,
    changes=st.lists(st.tuples(st.sampled_from(KEYS), TREES | st.just(...)), max_size=4),
    sections=st.dictionaries(
        st.text(max_size=8) | st.sampled_from(params.SECTIONS), TREES, max_size=1
    ),
)
def test_params_of_any_yaml_tree_are_loaded_unchanged_or_rejected(changes, sections):
    tree = {section: dict(values) for section, values in TREE.items()}
    for (section, key), value in changes:
        tree[section].pop(key, None)
        if value is not ...:
            tree[section][key] = value
    loaded = load_params(yaml.safe_dump(tree | sections).encode())
    if loaded is not None:
        for name, value in loaded.items():
            section, key = name.split(".")
            written = tree[section][key]
            values = zip(value, written, strict=True) if type(value) is list else [(value, written)]
            assert all(one == other or one == float(other) for one, other in values)  # '1e-5'


@fuzz(
    400,
    content=EDITS.map(lambda edits: damage(SHIPPED, edits))
    | st.binary()
    | st.text(st.sampled_from("[]{}:,-&*!|>'\"#%@?\n\n  \t<a=1.0x~_eE+T")).map(str.encode)
    | st.lists(
        st.sampled_from(
            [
                "model:",
                "\n",
                "  ",
                "n_layer: ",
                "0x1F",
                "1:30:00.5",
                "2024-13-45",
                "&a ",
                "*a",
                "- ",
            ]
            + ["!!int ", "!!bool ", "!!python/name:os.system ", "<<: ", "[", "]", "{", "}", ", "]
        )
    ).map(lambda words: "".join(words).encode()),
)
def test_params_of_any_bytes_are_loaded_or_rejected(content):
    load_params(content)


ODD_SCALARS = """yes no on off y n true null ~ nan .nan .inf inf = << 2024-01-01 1:40 1:40.5 0042 08
    0o17 0b1 0x1F 1_000 1e-5 1E5 .5 -.5 .5e3 1."""
PLAIN = st.text("0123456789_+-.:eExXobnNaAfFiI", min_size=1, max_size=10)
PLAIN |= st.sampled_from(re.findall(r"\S+", ODD_SCALARS))


@fuzz(600, scalar=PLAIN, key=st.sampled_from(KEYS), in_list=st.booleans())
def test_plain_scalar_in_params_has_the_value_that_dvc_reads_or_is_rejected(scalar, key, in_list):
    section, name = key
    tree = {section: dict(values) for section, values in TREE.items()}
    tree[section][name] = "PLACE"
    content = yaml.safe_dump(tree).replace("PLACE", f"[{scalar}]" if in_list else scalar)
    loaded = load_params(content.encode())
    if loaded is not None:
        value, in_dvc = (
            loaded[f"{section}.{name}"],
            parse_yaml(content, "params.yaml")[section][name],
        )
        pairs = zip(value, in_dvc, strict=True) if in_list else [(value, in_dvc)]
        assert all(one == other and type(one) in (type(other), float) for one, other in pairs)


def is_section(value: Any) -> bool:
    return isinstance(value, dict) and all(
        not isinstance(each, dict)
        and not (isinstance(each, list) and any(isinstance(item, dict | list) for item in each))
        for each in value.values()
    )


@fuzz(
    600,
    text=PLAIN
    | st.text(st.sampled_from("[]{}:,-&*!|>'\"#%@?\n\n  \t<a=1.0~\\nNu\u2028\x85\ufeffé\r")),
    form=st.sampled_from(["x: %s", "x: [%s, b]", "x:\n- %s\n- a", "x: '%s'", 'x: "%s"'])
    | st.sampled_from(["x: |\n  %s\n", "x: >\n  %s\n", "%s: 1", "%s"]),
)
def test_yaml_of_any_text_has_the_values_that_dvc_reads_or_is_rejected(text, form):
    document = form.replace("%s", text)
    try:
        found = strict_yaml.load(document)
    except (ValueError, OverflowError, yaml.YAMLError):
        return
    if is_section(found) and all(isinstance(key, str) for key in found):
        assert repr(found) == repr(dict(parse_yaml(document, "params.yaml")))


@fuzz(80, content=st.binary() | TREES.map(lambda tree: yaml.safe_dump(tree).encode()))
def test_variant_of_any_bytes_is_loaded_or_rejected(content):
    with empty_folder() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "FOLDER", folder)
        (folder / "mine.yaml").write_bytes(content)
        try:
            variants.read("mine")
        except UserError as error:
            assert_one_line(error, folder / "mine.yaml")


@fuzz(
    200,
    start=st.sampled_from(["", "/", "sqlite:///", "sqlite:////", "sqlite+pysqlite:///", "file:"])
    | st.sampled_from(["file:///", "file://", "http://127.0.0.1:5000/", "sqlite://"]),
    steps=st.lists(
        st.sampled_from(["..", ".", "", "a", "%2e%2e", "..\\..", "a..", "\0"]) | st.text()
    ),
)
def test_tracking_uri_with_a_relative_path_is_in_the_project_or_rejected(start, steps):
    uri = start + "/".join(steps)
    try:
        RuntimeParams(**TREE["runtime"] | {"tracking_uri": uri})
    except ValueError as error:
        assert str(error).startswith("tracking_uri: ") and ".." in unquote(uri)
        return
    path = "/".join(steps)
    if start in ("sqlite:///", "sqlite+pysqlite:///") and not path.startswith("/"):
        assert Path(os.path.normpath(f"/project/{path}")).is_relative_to("/project")


VALUES = (
    SCALARS
    | st.text(st.sampled_from("\\\"'${}[](),:=#~? \n\t\rax1.\x85\x7f\0\ufeff\u2028\ud800é🙂"))
    | st.lists(st.sampled_from(["ROMEO:", "\n", "\\n", "${oc.env:HOME}", "???", "\\", '"'])).map(
        "".join
    )
)


@fuzz(500, value=VALUES | st.lists(VALUES, max_size=3), key=st.sampled_from(KEYS))
def test_any_value_goes_through_dvc_unchanged_or_is_rejected(value, key):
    try:
        options = overrides.param_options({".".join(key): value})
    except UserError as error:
        assert_one_line(error, ".".join(key))
        return
    section, name = key
    expected = {section: dict(TREE[section])}  # the others would take most of the time
    with empty_folder() as folder:
        (folder / "params.yaml").write_text(yaml.safe_dump(expected, sort_keys=False))
        apply_overrides(folder / "params.yaml", options[1:])
        tree = params.read(folder / "params.yaml")
        in_dvc = parse_yaml((folder / "params.yaml").read_text(encoding="utf-8"), "params.yaml")
    expected[section][name] = value
    assert repr(tree[section][name]) == repr(value)
    assert repr(tree) == repr(in_dvc) and repr(tree) == repr(expected)


# --- text


@fuzz(350, text=TEXTS)
def test_tokenizer_decodes_what_it_encoded_from_any_text(text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.dtype == np.uint16 and (ids < tokenizer.VOCAB_SIZE).all()


@fuzz(
    350,
    text=TEXTS | st.text(st.characters() | st.sampled_from(" \n\r\x1c\x85\ud800\udc00'sl")),
    chunk=st.integers(1, 20),
    size=st.integers(1, 20),
)
def test_pieces_of_any_text_have_the_ids_lines_and_speeches_of_the_whole(text, chunk, size):
    assume(text)
    chunks = (text[at : at + chunk] for at in range(0, len(text), chunk))
    whole, added = (statistics.CorpusStatistics(tokenizer.VOCAB_SIZE) for _ in range(2))
    ids, no_ids = tokenizer.encode(text), tokenizer.encode("")
    whole.add(text, ids, no_ids)
    found = []
    for piece in tokenizer.pieces(chunks, size):
        found.append(tokenizer.encode(piece))
        added.add(piece, found[-1], no_ids)
    assert np.array_equal(np.concatenate(found), ids)
    assert (added.lines, added.speeches) == (whole.lines, whole.speeches)
    assert np.array_equal(added.train, whole.train)


FILE_NAMES = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"])
    | st.sampled_from("$_^{}\\\n\r\x1b\udc80\udcff"),
    min_size=1,
    max_size=50,
).filter(lambda name: name not in (".", ".."))
CONTENTS = (
    st.binary()
    | TEXTS.map(str.encode)
    | st.tuples(TEXTS, st.sampled_from(["utf-8-sig", "utf-16", "utf-32", "utf-7", "latin-1"])).map(
        lambda drawn: drawn[0].encode(drawn[1], "replace")
    )
    | TEXTS.map(lambda text: text.replace("\n", "\r\n").encode())
)


def write_corpus(root: Path, files: dict[str, bytes]) -> Path:
    folder = root / "data" / "raw" / "set"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def pieces_of(found: corpus.Corpus, size: int) -> list:
    """What a corpus contains, read in tasks of this size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "TASK", size)
        return [
            piece
            for task in tasks.divide(found, "text")
            for piece in tasks.read(found, task, "text", lambda _: None)
        ]


def text_of(found: corpus.Corpus, size: int = 1 << 20) -> str:
    """The text of a corpus, read in tasks of this size."""
    pieces = pieces_of(found, size)
    assert all(isinstance(piece, tasks.Piece) and piece.text for piece in pieces)
    return "".join(piece.text for piece in pieces)


@fuzz(
    250,
    files=st.dictionaries(FILE_NAMES.map(lambda name: f"{name}.txt"), CONTENTS, max_size=3),
    size=st.sampled_from([3, 20, 1 << 20]),
)
def test_corpus_of_any_bytes_is_read_unchanged_or_rejected(files, size):
    with empty_folder() as root:
        write_corpus(root, files)
        for name in ["data/raw/set", *(f"data/raw/set/{name}" for name in files)]:
            try:
                found = corpus.find(name, root)
                read = text_of(found, size)
            except UserError as error:
                assert_one_line(error, "data/raw/set")
                continue
            assert found.name.isprintable()
            one = [name.removeprefix("data/raw/set/")]
            texts, _ = folder.find_texts(root / "data/raw/set")
            keys = [path.name for path in texts] if name.endswith("/set") else one
            assert keys == sorted(keys)
            texts = [files[key].decode().removeprefix("\ufeff") for key in keys]
            joined = texts[0]
            for text in texts[1:]:
                joined += ("\n" if joined and not joined.endswith("\n") else "") + text
            assert read == joined


@fuzz(
    250,
    lines=st.lists(
        TEXTS.map(lambda text: json.dumps({"text": text}).encode())
        | CONTENTS
        | TREES.map(lambda tree: json.dumps(tree, default=str).encode()),
        max_size=4,
    ),
    size=st.sampled_from([3, 20, 1 << 20]),
)
def test_documents_of_any_bytes_are_read_or_rejected_with_their_line(lines, size):
    content = b"\n".join(lines)
    with empty_folder() as root:
        write_corpus(root, {"a.jsonl": content})
        try:
            texts = documents_of(corpus.find("data/raw/set", root), size)
        except UserError as error:
            assert_one_line(error, "data/raw/set/a.jsonl line ")
            return
        content = content.removeprefix(b"\xef\xbb\xbf")
        expected = [
            json.loads(line.decode())["text"] for line in content.split(b"\n") if line.strip()
        ]
        assert texts == [text for text in expected if text and not text.isspace()]


@fuzz(100, edits=EDITS, codec=st.sampled_from(["gz", "zst", "parquet"]))
def test_damaged_compressed_documents_are_rejected_or_read(edits, codec):
    name = "a.parquet" if codec == "parquet" else f"a.jsonl.{codec}"
    with empty_folder() as root:
        write_corpus(root, {name: damage(compressed_documents(codec), edits)})
        try:
            documents_of(corpus.find("data/raw/set", root))
        except UserError as error:
            assert_one_line(error, f"data/raw/set/{name}")


@functools.cache
def compressed_documents(codec: str) -> bytes:
    sink = pa.BufferOutputStream()
    if codec == "parquet":
        pq.write_table(pa.table({"text": ["What, ho!", "My lord?"] * 20}), sink)
    else:
        with pa.CompressedOutputStream(sink, {"gz": "gzip", "zst": "zstd"}[codec]) as stream:
            stream.write(b'{"text": "What, ho!"}\n' * 20)
    return sink.getvalue().to_pybytes()


def documents_of(found: corpus.Corpus, size: int = 1 << 20) -> list[str]:
    """The documents of a corpus, read in tasks of this size."""
    pieces = pieces_of(found, size)
    return [piece.text for piece in pieces if isinstance(piece, tasks.Piece)]


@fuzz(
    150,
    name=st.text()
    | st.lists(st.sampled_from(["data", "raw", "set", "..", ".", "", "~", "\0", "x" * 300])).map(
        "/".join
    ),
)
def test_corpus_of_any_name_is_found_or_rejected(name):
    assume(name not in corpus.NAMED)
    with empty_folder() as root:
        write_corpus(root, {"a.txt": b"text enough"})
        try:
            assert text_of(corpus.find(name, root)) == "text enough"
        except UserError as error:
            assert_one_line(error, "prepare.corpus")


@fuzz(8, name=FILE_NAMES, content=CONTENTS, fraction=st.floats(0.01, 0.99))
def test_prepare_writes_all_of_its_outs_or_none(name, content, fraction):
    with empty_folder() as root, warnings.catch_warnings():
        warnings.simplefilter("error")
        write_corpus(root, {name: content})
        settings = PrepareParams(
            corpus=f"data/raw/set/{name}",
            text_column="text",
            validation_fraction=fraction,
            training_fraction=1.0,
            segmentations=1,
            bpe_dropout=0.3,
            report_batch_size=8,
            report_block_size=128,
        )
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                prepare.run(settings, root, root)
        except UserError as error:
            assert_one_line(error, "data/raw")
            assert [path.name for path in (root / "data").iterdir()] == ["raw"]
            return
        assert printed.getvalue().replace("\n", "").isprintable()
        found = token_files.read(root / "data" / "prepared")
        parts = [tokenizer.decode(part) for part in (found.train, found.val)]
        assert "".join(parts) == content.decode().removeprefix("\ufeff")
        made = [path for path in (root / "data").rglob("*") if path.is_file()]
        assert tokenizer.decode(found.segmented[0]) == parts[0]
        assert len(made) == 11 and not any(
            path.name.startswith(".") for path in made if "set" not in path.parts
        )


@fuzz(6, text=TEXTS.filter(str.strip), title=st.text(st.characters(exclude_categories=["Cs"])))
def test_corpus_plots_of_any_text_and_title_can_be_saved(text, title):
    with empty_folder() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        counts = statistics.CorpusStatistics(tokenizer.VOCAB_SIZE)
        counts.add(text, tokenizer.encode(text), tokenizer.encode(""))
        for figure in (
            corpus_plots.length_histograms(counts, title),
            corpus_plots.rank_frequency(counts.train, title),
        ):
            plots.save(figure, folder / "plot.png")


# --- token files


@functools.cache
def token_file_contents() -> dict[str, bytes]:
    with empty_folder() as folder:
        ids = {"train": tokenizer.encode("What, ho! " * 20), "val": tokenizer.encode("My lord? ")}
        facts = {"corpus": "mine", "vocabulary": tokenizer.VOCAB_SIZE, "documents": 0}
        facts |= {"text_sha256": "", "train_tokens": len(ids["train"]), "train_characters": 200}
        facts |= {"train_bytes": 200, "val_tokens": len(ids["val"]), "val_characters": 9}
        counts = np.bincount(ids["train"], minlength=tokenizer.VOCAB_SIZE)
        pieces = {part: [each] for part, each in ids.items()}
        more = token_files.Segmentations(2, 0.1, lambda ids: [[ids[1:], ids[2:]]])
        token_files.write(folder, facts | {"val_bytes": 9}, counts, pieces, more)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


@fuzz(
    250,
    name=st.deferred(lambda: st.sampled_from(sorted(token_file_contents()))),
    edits=EDITS,
    key=st.sampled_from([*token_meta.META, *token_meta.SEGMENTED, "sha256", "more"]),
    value=TREES,
    kind=st.sampled_from(["bytes", "bytes", "value", "value", "missing", "folder"]),
)
def test_damaged_token_files_are_rejected_or_equivalent(name, edits, key, value, kind):
    with empty_folder() as folder:
        for each, content in token_file_contents().items():
            (folder / each).write_bytes(content)
        intact = token_files.read(folder)
        if kind == "bytes":
            (folder / name).write_bytes(damage(token_file_contents()[name], edits))
        elif kind == "value":
            name, meta = "meta.json", json.loads(token_file_contents()["meta.json"])
            (folder / name).write_text(json.dumps(meta | {key: value}))
        else:
            (folder / name).unlink()
            if kind == "folder":
                (folder / name).mkdir()
        try:
            found = token_files.read(folder)
        except UserError as error:
            assert_one_line(error, folder / name, "dvc repro --force prepare")
        else:
            assert found.meta == intact.meta and found.digest == intact.digest
            assert np.array_equal(found.train, intact.train)
            assert np.array_equal(found.val, intact.val)
            assert np.array_equal(found.segmented[1], intact.segmented[1])
            assert np.array_equal(found.trained_counts, intact.trained_counts)


# --- model folders


@functools.cache
def model_folder() -> tuple[dict[str, Any], bytes]:
    """The config and the weights file of a small model."""
    sizes = ModelParams(n_layer=2, n_head=2, n_embd=8, block_size=4, dropout=0.0)
    with empty_folder() as folder:
        huggingface.save(GPT(sizes, 11), folder / "gpt2")
        config = json.loads((folder / "gpt2/config.json").read_text())
        return config, (folder / "gpt2/model.safetensors").read_bytes()


def open_model(config: bytes, weights: bytes) -> GPT | None:
    """The loaded model, after a forward pass; None if the folder was rejected with one line."""
    with empty_folder() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        (folder / "config.json").write_bytes(config)
        (folder / "model.safetensors").write_bytes(weights)
        try:
            model = huggingface.load(folder)
        except UserError as error:
            assert_one_line(error, folder)
            return None
        assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    with torch.no_grad():
        assert model(torch.zeros(1, 1, dtype=torch.int64)).shape[:2] == (1, 1)
    return model


@fuzz(
    200,
    changes=st.dictionaries(
        st.sampled_from(sorted({*model_folder()[0], "n_inner", "scale_attn_weights"})),
        TREES,
        min_size=1,
        max_size=3,
    ),
)
def test_config_of_any_values_is_loaded_or_rejected(changes):
    config, weights = model_folder()
    model = open_model(json.dumps(config | changes).encode(), weights)
    if model is not None:
        assert (model.params.n_layer, model.params.n_embd) == (2, 8)


@fuzz(200, name=st.sampled_from(["config", "weights"]), edits=EDITS, near_start=st.booleans())
def test_damaged_model_folder_is_loaded_or_rejected(name, edits, near_start):
    config, weights = model_folder()
    config = json.dumps(config).encode()
    if near_start:  # in the length of the header and the first names
        edits = [(kind, fraction / 100, new) for kind, fraction, new in edits]
    if name == "config":
        open_model(damage(config, edits), weights)
    else:
        open_model(config, damage(weights, edits))


TENSOR_CHANGES = st.tuples(
    st.integers(0, 27),  # the index of a tensor
    st.sampled_from(["drop", "rename", "cast", "reshape", "transpose", "duplicate", "infinite"]),
    st.text(max_size=12) | st.sampled_from(["h.9.ln_1.bias", "wte.weight", "transformer.h.0"]),
    st.sampled_from([torch.int8, torch.int64, torch.bool, torch.float16, torch.bfloat16])
    | st.sampled_from([torch.float64, torch.float8_e4m3fn, torch.complex64]),
    st.lists(st.integers(0, 9), max_size=3),
)


@fuzz(
    150,
    changes=st.lists(TENSOR_CHANGES, min_size=1, max_size=3),
    n_layer=st.sampled_from([2, 2, 1, 3]),
)
def test_tensors_of_any_name_shape_and_dtype_are_loaded_or_rejected(changes, n_layer):
    config, weights = model_folder()
    tensors = safetensors.torch.load(weights)
    names = sorted(tensors)
    for index, kind, text, dtype, shape in changes:
        name = names[index]
        if name not in tensors:
            continue
        if kind == "drop":
            del tensors[name]
        elif kind == "rename":
            tensors[text] = tensors.pop(name)
        elif kind == "cast" and not tensors[name].is_complex():
            tensors[name] = tensors[name].to(dtype)
        elif kind == "reshape":
            tensors[name] = torch.zeros(shape)
        elif kind == "transpose" and tensors[name].dim() == 2:
            tensors[name] = tensors[name].T.contiguous()
        elif kind == "duplicate":
            tensors[name.removeprefix("transformer.")] = tensors[name].clone()
        elif kind == "infinite":
            tensors[name] = torch.full_like(tensors[name], 1).div(0).to(tensors[name].dtype)
    open_model(json.dumps(config | {"n_layer": n_layer}).encode(), safetensors.torch.save(tensors))


@functools.cache
def sharded_folder() -> dict[str, bytes]:
    """The files of a small model in two shards."""
    config, weights = model_folder()
    tensors = safetensors.torch.load(weights)
    names, files = sorted(tensors), ("model-1.safetensors", "model-2.safetensors")
    of_file = {files[0]: names[:10], files[1]: names[10:]}
    index = {"weight_map": {name: file for file in files for name in of_file[file]}}
    return {
        "config.json": json.dumps(config).encode(),
        "model.safetensors.index.json": json.dumps(index).encode(),
    } | {
        file: safetensors.torch.save({name: tensors[name] for name in of_file[file]})
        for file in files
    }


@fuzz(
    250,
    name=st.sampled_from(["model.safetensors.index.json", "model-1.safetensors"]),
    edits=EDITS,
    entries=st.dictionaries(
        st.text(max_size=8) | st.sampled_from(["transformer.wte.weight", "transformer.ln_f.bias"]),
        TREES
        | st.sampled_from(["../model-1.safetensors", "/dev/zero", "model-2.safetensors", "..", "."])
        | st.sampled_from(
            ["config.json", "model-3.safetensors", "a\0.safetensors", ".safetensors"]
        ),
        max_size=2,
    ),
    kind=st.sampled_from(["bytes", "entries", "missing", "tree"]),
    tree=TREES,
)
def test_damaged_shards_and_indexes_are_rejected_or_equivalent(name, edits, entries, kind, tree):
    files = dict(sharded_folder())
    index = json.loads(files["model.safetensors.index.json"])
    if kind == "bytes":
        files[name] = damage(files[name], edits)
    elif kind == "entries":
        index["weight_map"] |= entries
        files["model.safetensors.index.json"] = json.dumps(index).encode()
    elif kind == "tree":
        files["model.safetensors.index.json"] = json.dumps({"weight_map": tree}).encode()
    else:
        del files[name]
    with empty_folder() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        for each, content in files.items():
            (folder / each).write_bytes(content)
        try:
            model = huggingface.load(folder)
        except UserError as error:
            assert_one_line(error, folder)
            return
    assert model.params.n_layer == 2
    with torch.no_grad():
        assert model(torch.zeros(1, 1, dtype=torch.int64)).shape == (1, 1, 11)


# --- checkpoints


@functools.cache
def checkpoints() -> dict[int, Checkpoint]:
    return {
        step: Checkpoint(step, {"model.w": torch.full((3,), float(step))}, {"history": [step]})
        for step in (4, 8)
    }


@functools.cache
def checkpoint_files() -> dict[str, bytes]:
    with empty_folder() as folder:
        for each in checkpoints().values():
            checkpoint.save(folder, each)
        files = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@fuzz(
    150,
    changes=st.lists(
        st.tuples(
            st.integers(0, 3), st.sampled_from(["bytes", "bytes", "missing", "folder"]), EDITS
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_load_latest_takes_the_newest_undamaged_checkpoint(changes):
    with empty_folder() as folder:
        for name, content in checkpoint_files().items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        names = sorted(checkpoint_files())
        for index, kind, edits in changes:
            path = folder / names[index]
            if kind == "bytes" and path.is_file():
                path.write_bytes(damage(path.read_bytes(), edits))
            elif path.is_file():
                path.unlink()
                if kind == "folder":
                    path.mkdir()
        undamaged = [
            step
            for step in checkpoints()
            if all(
                (folder / name).is_file() and (folder / name).read_bytes() == content
                for name, content in checkpoint_files().items()
                if int(name[len("step-") :].partition("/")[0]) == step
            )
        ]
        messages = io.StringIO()
        try:
            with contextlib.redirect_stderr(messages):
                found = checkpoint.load_latest(folder)
        except UserError as error:
            assert_one_line(error, folder)
            assert not undamaged
        else:
            assert found.step >= max(undamaged, default=0)
            expected = checkpoints()[found.step]
            assert found.state == expected.state
            assert torch.equal(found.tensors["model.w"], expected.tensors["model.w"])
        lines = messages.getvalue().splitlines()
        assert all(line.isprintable() and len(line) < 1_000 for line in lines)
