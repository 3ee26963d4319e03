"""The prepare stage as a whole."""

import contextlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, environment, set_params

from folio import params
from folio.corpus import reading
from folio.corpus.params import PrepareParams
from folio.errors import UserError
from folio.run import ARTIFACTS, TRAINING
from folio.tokens import token_files, tokenizer
from stages import prepare

OUTS = [
    "data/diagnostics.json",
    "data/diagnostics/lengths.png",
    "data/diagnostics/most_common_tokens.csv",
    "data/diagnostics/rank_frequency.png",
    "data/prepared/meta.json",
    "data/prepared/train.bin",
    "data/prepared/train_counts.bin",
    "data/prepared/val.bin",
]


def test_training_logs_every_report_on_the_corpus():
    logged = [path for path in ARTIFACTS[TRAINING] if path.startswith("data/")]
    assert logged == [path for path in OUTS if path.startswith("data/diagnostics")]


def run(params, root):
    prepare.run(params, root, root)


def settings(**changes):
    defaults = {
        "corpus": "tinyshakespeare",
        "text_column": "text",
        "validation_fraction": 0.1,
        "training_fraction": 1.0,
        "segmentations": 0,
        "bpe_dropout": 0.1,
        "report_batch_size": 8,
        "report_block_size": 128,
    }
    return PrepareParams(**defaults | changes)


def write_params(root, corpus):
    shutil.copy(ROOT / "params.yaml", root)
    set_params(root, {"prepare.corpus": corpus})


def written(root):
    """All files under root except the user's own."""
    paths = (path for path in root.rglob("*") if path.is_file())
    names = sorted(path.relative_to(root).as_posix() for path in paths)
    return [name for name in names if not name.startswith(("data/raw/", "params.yaml"))]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "data" / "raw").mkdir(parents=True)
    (tmp_path / "data" / "raw" / "mine.txt").write_text("What, ho!\n\nMy lord?\n" * 20)
    return tmp_path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A root with tinyshakespeare prepared, and the report that was printed."""
    root = tmp_path_factory.mktemp("project")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run(settings(), root)
    return root, printed.getvalue()


def test_summary_of_tinyshakespeare_has_the_known_figures(prepared):
    root, _ = prepared
    content = (root / "data" / "diagnostics.json").read_text()
    summary = json.loads(content)
    assert summary == {
        "characters": 1_115_394,
        "tokens": 338_025,
        "unique_tokens": 11_706,
        "vocabulary": 50_257,
        "characters_per_token": 1_115_394 / 338_025,
        "train_tokens": 301_966,
        "val_tokens": 36_059,
        "batches_per_epoch": 330,
        "unseen_val_share": 757 / 36_059,
    }
    assert content == json.dumps(summary, indent=2) + "\n"


def test_stage_writes_only_its_outs(prepared):
    root, _ = prepared
    assert written(root) == OUTS


def test_token_files_decode_to_the_corpus(prepared):
    root, _ = prepared
    data = token_files.read(root / "data" / "prepared")
    assert data.meta["corpus"] == "tinyshakespeare"
    assert (data.meta["train_characters"], data.meta["val_characters"]) == (1_003_854, 111_540)
    assert len(tokenizer.decode(data.val)) == data.meta["val_characters"]
    assert tokenizer.decode(data.train[:4]) == "First Citizen:\n"


def test_report_has_the_figures_and_the_first_300_characters(prepared):
    _, report = prepared
    for figure in ["1,115,394", "338,025", "11,706", "301,966", "36,059", " 330 ", "3.30"]:
        assert figure in report
    start = report.split("The first 300 characters:\n")[1].removesuffix("\n")
    assert start.startswith("First Citizen:\nBefore we proceed any further")
    assert len(start) == 300


def test_most_common_tokens_can_be_read_as_csv(prepared):
    root, _ = prepared
    table = pd.read_csv(root / "data" / "diagnostics" / "most_common_tokens.csv")
    assert len(table) == 100
    assert table["rank"].tolist() == list(range(1, 101))
    assert table.iloc[0]["text"] == r"'\n'"
    assert table["count"].is_monotonic_decreasing
    assert np.allclose(table["share"], table["count"] / 338_025)


def test_preparing_twice_gives_the_same_bytes(root):
    def outs():
        run(settings(corpus="data/raw/mine.txt"), root)
        return {name: (root / name).read_bytes() for name in OUTS}

    assert outs() == outs()


def test_outs_do_not_depend_on_the_number_of_cores_and_pieces(root, monkeypatch):
    text = "What, ho!\n\nMy lord? 'Tis  I.\r\n \n\U0001f642" * 300
    (root / "data/raw/mine.txt").write_bytes(text.encode())

    def outs():
        run(settings(corpus="data/raw/mine.txt", validation_fraction=0.313), root)
        return {name: (root / name).read_bytes() for name in OUTS}

    whole = outs()
    monkeypatch.setattr(reading, "CHUNK", 100)
    monkeypatch.setattr(tokenizer.pieces, "__defaults__", (100,))
    for cores in (1, 2):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: range(n), raising=False)
        assert outs() == whole


def test_own_text_is_split_by_the_validation_fraction(root, capsys):
    run(settings(corpus="data/raw/mine.txt", validation_fraction=0.25), root)
    meta = token_files.read(root / "data" / "prepared").meta
    assert meta["corpus"] == "data/raw/mine.txt"
    assert (meta["train_characters"], meta["val_characters"]) == (300, 100)
    assert "Corpus: data/raw/mine.txt" in capsys.readouterr().out


def report_of_folder(root, capsys, texts):
    for name, text in texts.items():
        (root / "data/raw/set" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "data/raw/set" / name).write_text(text)
    run(settings(corpus="data/raw/set"), root)
    return capsys.readouterr().out


def letters(start: int) -> str:
    return "".join(
        f"Letter {n}: the moon, {n * 7919 % 1000} stars.\n" for n in range(start, start + 99)
    )


def test_report_names_what_is_left_out_of_a_folder(root, capsys):
    leftovers = [f".ipynb_checkpoints/{name}-checkpoint.txt" for name in "abcdefg"]
    texts = {"a.txt": letters(0), "b.txt": letters(100), **dict.fromkeys(leftovers, letters(100))}
    report = report_of_folder(root, capsys, texts)
    assert "  Files                            2\n" in report
    assert f"\nLeft out: {', '.join(leftovers[:5])} and 2 more\n" in report
    assert "Warning" not in report


def test_report_warns_about_a_table_that_was_read_as_running_text(root, capsys):
    (root / "data/raw/mine.csv").write_text(letters(0))
    run(settings(corpus="data/raw/mine.csv"), root)
    report = capsys.readouterr().out
    assert "\nWarning: data/raw/mine.csv was read as running text: if it contains" in report


def test_report_warns_about_files_with_the_same_text(root, capsys):
    texts = {"a.txt": letters(0), "b.txt": letters(100), "z/b copy.txt": letters(100)}
    report = report_of_folder(root, capsys, texts)
    assert (
        "\nWarning: the same text is in b.txt, z/b copy.txt: remove all but one of them\n" in report
    )
    assert "\nWarning: 100.0% of the validation text also occurs in the training text" in report


def test_report_warns_about_validation_text_within_a_training_file(root, capsys):
    texts = {"all.txt": letters(0) + letters(100), "b.txt": letters(140)[:1500]}
    report = report_of_folder(root, capsys, texts)
    assert "\nWarning: 100.0% of the validation text also occurs in the training text" in report
    assert "the same text" not in report


def test_report_warns_about_the_end_of_text_token(root, capsys, monkeypatch):
    monkeypatch.setattr(tokenizer.pieces, "__defaults__", (100,))
    text = "".join(f"Letter {n}.<|endoftext|>\n" for n in range(1_234))
    (root / "data/raw/mine.txt").write_text(text)
    run(settings(corpus="data/raw/mine.txt"), root)
    report = capsys.readouterr().out
    assert "\nWarning: <|endoftext|> occurs 1,234 times. It is plain text of seven tokens" in report
    data = token_files.read(root / "data/prepared")
    assert 50256 not in data.train and 50256 not in data.val


def test_documents_of_all_kinds_are_prepared_and_reported(corpus_folder, capsys):
    corpus_folder.write("a.jsonl.gz", [letters(0), "", letters(100), None])
    corpus_folder.write("b.parquet", [letters(200)] * 3)
    corpus_folder.write("c.txt.zst", letters(300))
    run(settings(corpus="data/raw/set"), corpus_folder.root)
    report = capsys.readouterr().out
    assert "\n  Documents                        6  each ends with token 50256\n" in report
    place = "data/raw/set/a.jsonl.gz line 2"
    assert f"\nLeft out: 2 documents without text; the first is {place}\n" in report
    data = token_files.read(corpus_folder.root / "data/prepared")
    assert data.meta["documents"] == 6 and data.train_counts[50256] == 5
    assert tokenizer.decode(data.val) == letters(300) + "<|endoftext|>"
    train = letters(0), letters(100), *[letters(200)] * 3
    assert tokenizer.decode(data.train) == "".join(f"{text}<|endoftext|>" for text in train)


def test_segmentations_are_of_the_training_text_alone(corpus_folder, capsys):
    corpus_folder.write("a.jsonl.gz", [letters(0), letters(100)])
    corpus_folder.write("b.txt", letters(300))

    def prepared(count):
        run(settings(corpus="data/raw/set", segmentations=count), corpus_folder.root)
        data = corpus_folder.root / "data"
        files = {path.name: path.read_bytes() for path in data.rglob("*.*") if path.is_file()}
        return token_files.read(data / "prepared"), files, capsys.readouterr().out

    plain, without, report_without = prepared(0)
    found, files, report = prepared(3)
    again, after, _ = prepared(0)
    assert after == without and again.digest == plain.digest
    changed = {name for name in files if files[name] != without.get(name)} - {"meta.json"}
    numbered = {f"train-segmented-{n:02d}.bin" for n in (1, 2, 3)}
    assert changed == numbered | {"train_segmented_counts.bin"}
    text = tokenizer.decode(found.train)
    for ids in found.segmented:
        assert tokenizer.decode(ids) == text
        assert len(ids) > 1.02 * len(found.train) and (ids == 50256).sum() == 2
    total = sum(map(len, found.segmented))
    rows = [row for row in report.splitlines() if row not in report_without.splitlines()]
    assert rows[0] == f"  Segmentations                    3  BPE dropout 0.1: {total:,} tokens"
    share = (found.trained_counts[found.val] == 0).mean()
    assert rows[1:] == [" " * 38 + f"{share:.2%} of them in no segmentation either"]
    assert 0 < share < (found.train_counts[found.val] == 0).mean()
    counts = np.bincount(np.concatenate([found.train, *found.segmented]), minlength=50_257)
    assert np.array_equal(found.trained_counts, counts)
    assert np.array_equal(found.train_counts, plain.train_counts)


def test_training_fraction_uses_the_end_of_the_training_text(prepared, tmp_path, capsys):
    run(settings(training_fraction=0.0625, segmentations=2), tmp_path)
    report = capsys.readouterr().out
    whole = token_files.read(prepared[0] / "data/prepared")
    data = token_files.read(tmp_path / "data/prepared")
    used = int(301_966 * 0.0625)
    assert np.array_equal(data.train, whole.train[-used:]) and np.array_equal(data.val, whole.val)
    assert np.array_equal(data.train_counts, np.bincount(data.train, minlength=50_257))
    text = tokenizer.decode(data.train)
    assert [tokenizer.decode(ids) for ids in data.segmented] == [text] * 2
    assert data.meta["train_characters"] == len(text) and data.meta["train_bytes"] == len(text)
    summary = json.loads((tmp_path / "data/diagnostics.json").read_text())
    before = json.loads((prepared[0] / "data/diagnostics.json").read_text())
    unseen = (data.train_counts[data.val] == 0).mean()
    changed = {"train_tokens": used, "unseen_val_share": unseen, "training_fraction": 0.0625}
    assert summary == before | changed
    assert "  Training tokens             18,872  the last 6.25 % of 301,966\n" in report


def test_report_warns_about_nul_characters(root, capsys):
    (root / "data/raw/mine.txt").write_bytes(("Letter.\n" * 20).encode("utf-16-le"))
    run(settings(corpus="data/raw/mine.txt"), root)
    assert "\nWarning: the text contains 160 NUL characters. If it is UTF-16" in (
        capsys.readouterr().out
    )


def test_report_escapes_control_characters(root, capsys):
    (root / "data/raw/mine.txt").write_bytes(b"\x1b]0;title\x07one\0\r\n" * 20)
    run(settings(corpus="data/raw/mine.txt"), root)
    printed = capsys.readouterr().out
    assert printed.replace("\n", "").isprintable()
    assert "\\x1b]0;title\\x07one\\x00\\r\n" in printed


def test_report_can_be_printed_on_a_terminal_that_is_not_utf_8(root):
    (root / "data/raw/mine.txt").write_text("na\u00efve \u4e2d\n" * 20, encoding="utf-8")
    write_params(root, "data/raw/mine.txt")
    done = subprocess.run(
        [sys.executable, "-m", "stages.prepare"],
        cwd=root,
        env=environment(ROOT, PYTHONIOENCODING="ascii"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "na\\xefve \\u4e2d" in done.stdout and done.stderr == ""


def test_bad_input_writes_no_file(root):
    with pytest.raises(UserError):
        run(settings(corpus="data/raw/missing.txt"), root)
    assert written(root) == []


def test_full_disk_leaves_no_incomplete_file(root):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))  # bytes: too few for train_counts
    try:
        with pytest.raises(OSError, match="File too large"):
            run(settings(corpus="data/raw/mine.txt"), root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert written(root) == []


def test_bad_input_on_the_command_line_is_one_line_with_status_1(root):
    write_params(root, "tinyshakspeare")
    done = subprocess.run(
        [sys.executable, "-m", "stages.prepare"],
        cwd=root,
        env=environment(ROOT),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "did you mean tinyshakespeare?" in done.stderr


def test_params_out_of_bounds_are_named(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(
        "prepare: {corpus: tinyshakespeare, validation_fraction: 1.0,"
        " report_batch_size: 0, report_block_size: 128}"
    )
    with pytest.raises(UserError) as problem:
        params.load(path, prepare=PrepareParams)
    assert "prepare.validation_fraction" in str(problem.value)
    assert "prepare.report_batch_size" in str(problem.value)
