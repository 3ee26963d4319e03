"""Files are read as they are, or rejected with the place of what is wrong."""

import json
from pathlib import Path

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from folio.corpus import reading, tables
from folio.corpus.reading import read_documents, read_text
from folio.errors import UserError

TEXT = "one\r\ntwo\rthree\n\u2028 na\u00efve \U0001f642\ufeff\x00\n\n"


def text_of(folder, name, start=0, end=None):
    return "".join(read_text(folder.find(f"data/raw/set/{name}").files[0], start, end))


def documents_of(folder, name, column="text"):
    [file] = folder.find(f"data/raw/set/{name}").files
    end = len(tables.row_groups(file, column)) if file.kind == "parquet" else file.size
    return [document.text for document in read_documents(file, 0, end, column)]


def error_of(read, *arguments):
    with pytest.raises(UserError) as error:
        read(*arguments)
    assert "\n" not in str(error.value) and "data/raw/set/" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 1 << 20])
def test_text_is_read_unchanged_except_for_the_byte_order_mark(
    corpus_folder, monkeypatch, chunk, suffix
):
    monkeypatch.setattr(reading, "CHUNK", chunk)
    corpus_folder.write(f"a.txt{suffix}", TEXT.encode("utf-8-sig"))
    assert text_of(corpus_folder, f"a.txt{suffix}") == TEXT


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
def test_text_can_be_read_from_any_byte_to_any_byte(corpus_folder, monkeypatch, chunk):
    monkeypatch.setattr(reading, "CHUNK", chunk)
    size = corpus_folder.write("a.txt", TEXT).stat().st_size
    for cut in range(size + 1):
        assert (
            text_of(corpus_folder, "a.txt", 0, cut) + text_of(corpus_folder, "a.txt", cut, size)
            == TEXT
        )
        assert text_of(corpus_folder, "a.txt", cut) == text_of(corpus_folder, "a.txt", cut, size)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 1 << 20])
def test_invalid_utf_8_error_states_the_byte_position(corpus_folder, monkeypatch, chunk):
    monkeypatch.setattr(reading, "CHUNK", chunk)
    corpus_folder.write("latin.txt", b"\xef\xbb\xbfna\xefve")
    corpus_folder.write("wide.txt", "text".encode("utf-16"))
    corpus_folder.write("half.txt", "na\u00efve \U0001f642".encode()[:-1])
    corpus_folder.write("latin.txt.gz", b"na\xefve")
    assert "latin.txt is not valid UTF-8 at byte 5" in error_of(text_of, corpus_folder, "latin.txt")
    assert "latin.txt is not valid UTF-8 at byte 5" in error_of(
        text_of, corpus_folder, "latin.txt", 3
    )
    assert "wide.txt is not valid UTF-8 at byte 0" in error_of(text_of, corpus_folder, "wide.txt")
    assert "half.txt is not valid UTF-8 at byte 7:" in error_of(text_of, corpus_folder, "half.txt")
    line = error_of(text_of, corpus_folder, "latin.txt.gz")
    assert "latin.txt.gz is not valid UTF-8 at byte 2 of the decompressed text:" in line


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [  # pyarrow writes .zst without a checksum
        *((".gz", "truncated"), (".gz", "changed"), (".gz", "not compressed")),
        *((".zst", "truncated"), (".zst", "not compressed")),
    ],
)
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_damaged_compressed_file_is_named(corpus_folder, suffix, damage, kind):
    content = TEXT * 9_000 if kind == "txt" else [TEXT] * 9_000
    path = corpus_folder.write(f"a.{kind}{suffix}", content)
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 0x55
    path.write_bytes(
        {"truncated": whole[:-10], "changed": bytes(changed), "not compressed": b"text"}[damage]
    )
    line = error_of(text_of if kind == "txt" else documents_of, corpus_folder, path.name)
    assert f"a.{kind}{suffix} is damaged (" in line and "copy it again, or remove it" in line


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_document_is_a_line_or_a_row(corpus_folder, name):
    texts = [TEXT, "", "caf\u00e9", None, " \n"]
    corpus_folder.write(name, texts)
    assert documents_of(corpus_folder, name) == [TEXT, "", "caf\u00e9", "", " \n"]


def test_lines_may_end_in_any_way_and_be_blank(corpus_folder):
    corpus_folder.write(
        "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"n": {"text": 1}, "text": "b"}'
    )
    assert documents_of(corpus_folder, "a.jsonl") == ["a", "b"]


def test_every_line_belongs_to_the_range_where_it_begins(corpus_folder):
    texts = ["a", "bcd", "", "\u00e9" * 20]
    path = corpus_folder.write("a.jsonl", texts)
    [file] = corpus_folder.find().files
    size = path.stat().st_size
    for cut in range(size + 1):
        parts = [read_documents(file, *limits, "text") for limits in [(0, cut), (cut, size)]]
        assert [document.text for part in parts for document in part] == texts


def test_missing_text_of_pandas_is_an_empty_document(corpus_folder):
    corpus_folder.write("a.jsonl", b'{"text": NaN}\n{"text": "a"}\n')
    assert documents_of(corpus_folder, "a.jsonl") == ["", "a"]
    pandas.DataFrame({"text": [None, None]}).to_parquet(corpus_folder.path / "a.parquet")
    assert documents_of(corpus_folder, "a.parquet") == ["", ""]


def test_text_column_may_have_another_name_and_type(corpus_folder):
    table = {"body": pa.array(["a", "b", "a"]).dictionary_encode(), "large": ["x", "y", "z"]}
    table["large"] = pa.array(table["large"], pa.large_string())
    pq.write_table(pa.table(table), corpus_folder.path / "a.parquet")
    assert documents_of(corpus_folder, "a.parquet", "body") == ["a", "b", "a"]
    assert documents_of(corpus_folder, "a.parquet", "large") == ["x", "y", "z"]
    corpus_folder.write("a.jsonl", b'{"body": "a"}\n')
    assert documents_of(corpus_folder, "a.jsonl", "body") == ["a"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "is not valid JSON: fix or remove it"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"text": ' + b"1" * 5_000 + b"}", "is not valid JSON"),
        (b'{"text": "\xff"}', "is not valid UTF-8: convert the file to UTF-8"),
        (b'"text"', "is not a JSON object: each line must be one"),
        (b'{"body": "a", "id": 1}', "has no 'text', but 'body', 'id': set prepare.text_column"),
        (b"{}", "has no 'text', but nothing"),
        (b'{"text": Infinity}', "has no text in 'text': set prepare.text_column"),
        (b'{"text": 7}', "has no text in 'text': set prepare.text_column"),
    ],
)
def test_line_without_text_is_named_with_its_number(corpus_folder, line, problem):
    good = b'{"text": "a"}\n'
    for name in ("a.jsonl", "a.jsonl.gz"):
        corpus_folder.write(name, 2 * good + b"\n" + line + b"\n" + good)
        assert f"{name} line 4 {problem}" in error_of(documents_of, corpus_folder, name)
    [file, _] = corpus_folder.find().files
    with pytest.raises(UserError, match=r"a\.jsonl line 4 "):
        list(read_documents(file, len(good), file.size, "text"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_long_names_and_types_of_columns_are_shortened(corpus_folder, name):
    row = {f"{n}{'x' * 5_000}": {"a" * 5_000: 1} for n in range(20)}
    if name == "a.jsonl":
        corpus_folder.write(name, json.dumps(row).encode())
    else:
        pq.write_table(pa.Table.from_pylist([row]), corpus_folder.path / name)
    for column in ("text", "0" + "x" * 5_000, "y" * 5_000):
        line = error_of(documents_of, corpus_folder, name, column)
        assert len(line) < 800 and "..." in line


def test_lone_surrogates_in_json_are_replaced(corpus_folder):
    corpus_folder.write("a.jsonl", b'{"text": "a\\ud800b \\ud83d\\ude42"}\n')
    assert documents_of(corpus_folder, "a.jsonl") == ["a\ufffdb \U0001f642"]


def test_parquet_without_the_text_is_named(corpus_folder):
    pq.write_table(
        pa.table({"body": ["a"], "id": [1], "raw": [b"x"]}), corpus_folder.path / "a.parquet"
    )
    line = error_of(documents_of, corpus_folder, "a.parquet")
    assert "a.parquet has no 'text', but 'body', 'id', 'raw': set prepare.text_column" in line
    for column, kind in {"id": "int64", "raw": "binary"}.items():
        line = error_of(documents_of, corpus_folder, "a.parquet", column)
        assert f"a.parquet has {kind} in '{column}', not text: set prepare.text_column" in line


def test_parquet_with_several_columns_of_that_name_is_named(corpus_folder):
    rows = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(rows, corpus_folder.path / "a.parquet")
    line = error_of(documents_of, corpus_folder, "a.parquet")
    assert line.endswith("a.parquet has 2 columns 'text': rename or remove all but one of them")


@pytest.mark.parametrize("error", [KeyError("text"), OverflowError("7"), pa.ArrowInvalid("x")])
def test_any_error_of_pyarrow_means_that_the_file_is_damaged(corpus_folder, monkeypatch, error):
    corpus_folder.write("a.parquet", ["a"])

    def fail(*_, **__):
        raise error

    def fail_later(*_, **__):
        yield from fail()

    for name, function in {"__init__": fail, "iter_batches": fail_later}.items():
        with monkeypatch.context() as patch:
            patch.setattr(pq.ParquetFile, name, function)
            assert "a.parquet is damaged (" in error_of(documents_of, corpus_folder, "a.parquet")


@pytest.mark.parametrize("damage", ["empty", "truncated", "changed"])
def test_damaged_parquet_is_named(corpus_folder, damage):
    path = corpus_folder.write("a.parquet", ["a longer text " * 50] * 9)
    whole = path.read_bytes()
    changed = whole[:4] + bytes(200) + whole[204:]
    path.write_bytes({"empty": b"", "truncated": whole[:-20], "changed": changed}[damage])
    assert "a.parquet is damaged (" in error_of(documents_of, corpus_folder, "a.parquet")


def test_invalid_utf_8_in_parquet_is_named_with_its_rows(corpus_folder):
    texts = pa.array([b"a", b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"text": texts}), corpus_folder.path / "a.parquet")
    line = error_of(documents_of, corpus_folder, "a.parquet")
    assert "a.parquet has text that is not valid UTF-8 in rows 1 to 2" in line


def test_unreadable_file_is_named(corpus_folder, monkeypatch):
    corpus_folder.write("a.txt", "text")
    [file] = corpus_folder.find().files

    def deny(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)
    with pytest.raises(UserError, match=r"a\.txt cannot be read \(Permission denied\)"):
        list(read_text(file, 0, None))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.zst", "a.parquet"])
def test_bytes_that_were_read_add_up_to_the_size(corpus_folder, name):
    path = corpus_folder.write(name, "word " * 50_000 if ".txt" in name else ["word " * 50] * 1_000)
    [file] = corpus_folder.find().files
    read = []
    if file.kind == "txt":
        list(read_text(file, 0, None, read.append))
    else:
        end = len(tables.row_groups(file, "text")) if file.kind == "parquet" else file.size
        list(read_documents(file, 0, end, "text", read.append))
    assert sum(read) == pytest.approx(path.stat().st_size)


def test_json_of_plan_and_documents_is_ascii_or_not(corpus_folder):
    lines = [json.dumps({"text": TEXT}, ensure_ascii=ascii) for ascii in (True, False)]
    corpus_folder.write("a.jsonl", "\n".join(lines).encode())
    assert documents_of(corpus_folder, "a.jsonl") == [TEXT, TEXT]
