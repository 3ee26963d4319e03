"""What `sample` prints to a terminal and reads from standard input, and its precision."""

import errno
import io
import sys

import pytest
import torch
from typer.testing import CliRunner

from folio.cli import main, sample
from folio.errors import UserError
from folio.gpt.model import GPT, ModelParams
from folio.inference import generation
from folio.tokens.tokenizer import VOCAB_SIZE


def test_escape_disarms_control_characters():
    assert sample._escape("a\x1b[2J\tb\n“é”") == "a\\x1b[2J\tb\n“é”"


@pytest.fixture
def read(monkeypatch):
    """read(content, encoding): what `sample` reads if this content is on standard input."""

    def read(content: bytes, encoding: str = "utf-8") -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding=encoding))
        return sample._read_stdin()

    return read


@pytest.mark.parametrize(
    ("content", "encoding", "text"),
    [
        (b"ROMEO:\n", "utf-8", "ROMEO:\n"),
        (b"\xef\xbb\xbfROMEO:\r\nSpeak.\r", "utf-8", "ROMEO:\nSpeak.\n"),  # as from Windows
        ("Grüß dich 🙂".encode(), "utf-8", "Grüß dich 🙂"),
        ("Grüß dich".encode(), "ascii", "Grüß dich"),  # LANG=C, without Python's UTF-8 mode
        (b"Gr\xfc\xdf dich", "latin-1", "Grüß dich"),  # a terminal with this encoding
        (b"", "utf-8", ""),
    ],
)
def test_standard_input_is_read_as_text(read, content, encoding, text):
    assert read(content, encoding) == text


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"caf\xe9", "is not valid utf-8 at byte 3: convert it, for example with `iconv -f latin1"),
        ("ROMEO:".encode("utf-16"), "is not valid utf-8 at byte 0"),
        ("Grüß".encode("utf-16-le"), "is not valid utf-8 at byte 4"),
        ("ROMEO:".encode("utf-16-le"), "contains NUL characters: convert it to UTF-8"),
        ("naïve".encode()[:3], "is not valid utf-8 at byte 2"),
        (bytes(range(128, 220)), "is not valid utf-8 at byte 0"),
        (b"\xed\xa0\x80", "is not valid utf-8 at byte 0"),  # a surrogate
        ("é".encode() * 60, "has more than 99 bytes"),
    ],
)
def test_standard_input_that_is_not_text_is_a_one_line_error(read, monkeypatch, content, problem):
    monkeypatch.setattr(sample, "_MAX_STDIN", 99)
    with pytest.raises(UserError) as error:
        read(content[:200])
    assert str(error.value).startswith(f"standard input {problem}") and "\n" not in str(error.value)


def test_standard_input_that_cannot_be_read_is_a_one_line_error(read, monkeypatch):
    class Folder(io.BytesIO):
        def read(self, size=None):
            raise IsADirectoryError(errno.EISDIR, "Is a directory")

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Folder()))
    with pytest.raises(UserError, match=r"^standard input cannot be read: Is a directory$"):
        sample._read_stdin()
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match=r"^standard input is closed: give the prompt as an arg"):
        sample._read_stdin()


def test_error_during_generation_starts_on_a_new_line(capsys):
    def pieces():
        yield "KING"
        raise UserError("the model computes values that are NaN or infinite")

    with pytest.raises(UserError):
        sample._print(pieces())
    assert capsys.readouterr().out == "KING\n"


@pytest.fixture
def used(monkeypatch):
    """The dtypes of the models that `sample` has generated with."""
    sizes = ModelParams(n_layer=1, n_head=1, n_embd=8, block_size=8, dropout=0.0)
    gpt, dtypes, generate = GPT(sizes, VOCAB_SIZE).eval(), [], generation.generate

    def record(model, *options):
        dtypes.append(model.transformer.wte.weight.dtype)
        return generate(model, *options)

    monkeypatch.setattr("folio.tracking.model_loader.load_model", lambda *_: gpt)
    monkeypatch.setattr(sample, "tracking_uri", lambda: None)
    monkeypatch.setattr(generation, "generate", record)
    return dtypes


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ([], torch.float32),
        (["--precision", "auto"], torch.float32),
        (["--precision", "fp32"], torch.float32),
        (["--precision", "bf16"], torch.bfloat16),
        (["--precision", "fp16"], torch.float16),
    ],
)
def test_sample_generates_in_the_given_precision(used, options, dtype):
    words = ["sample", "To be", "--tokens", "9", "--seed", "1", "--device", "cpu", *options]
    done = CliRunner().invoke(main.app, words)
    assert done.exit_code == 0 and done.output.startswith("To be") and "seed 1, " in done.output
    assert used == [dtype]


@pytest.mark.parametrize("precision", ["fp8", "", "BF16 ", "16"])
def test_sample_refuses_any_other_precision(used, precision):
    done = CliRunner().invoke(main.app, ["sample", "--precision", precision])
    assert done.exit_code == 2 and "Invalid value for '--precision'" in done.output
    assert "not one of 'auto', 'bf16', 'fp16', 'fp32'" in " ".join(done.output.split())
    assert used == []
