"""What a command does between its start and its own work."""

import subprocess
import sys
from pathlib import Path

import pytest

from folio.gpt import huggingface
from folio.gpt.model import GPT, ModelParams
from folio.tokens import tokenizer

ROOT = Path(__file__).parent.parent
SOURCES = [*(ROOT / "folio").rglob("*.py"), *(ROOT / "stages").glob("*.py")]
COMMANDS = [path for path in SOURCES if 'if __name__ == "__main__":' in path.read_text()]


def run(code: str, command: bool = True) -> subprocess.CompletedProcess:
    """Run code in a new process, in which folio is imported as by `python -m`, or as a library."""
    start = f"import gc, sys; sys.argv[0] = {'-m' if command else ''!r}; import folio\n"
    words = [sys.executable, "-c", start + code]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


def test_command_is_not_interrupted_by_the_garbage_collector_during_its_imports():
    code = (
        "assert not gc.isenabled()\n"
        "from folio.errors import one_line_errors\n"
        "with one_line_errors():\n"
        "    assert gc.isenabled() and gc.get_freeze_count()\n"
    )
    assert run(code).stderr == ""


def test_garbage_collector_examines_nothing_at_the_exit_of_a_command():
    code = (
        "class Node: __del__ = lambda self: print('collected')\n"
        "node = Node(); node.itself = node; del node\n"
    )
    assert run(code).stdout == ""
    assert run(code, command=False).stdout == "collected\n"  # what Python does otherwise


def test_importing_the_library_leaves_the_garbage_collector_alone():
    assert run("assert gc.isenabled() and not gc.get_freeze_count()", command=False).stderr == ""


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_command_enables_the_garbage_collector(path):
    source = path.read_text()
    if path.name == "__main__.py":  # it calls this main
        source = (ROOT / "folio/cli/main.py").read_text()
    assert "with one_line_errors()" in source or "gc.enable()" in source


def test_sample_imports_only_what_it_needs(tmp_path):
    size = ModelParams(n_layer=1, n_head=1, n_embd=4, block_size=8, dropout=0.0)
    huggingface.save(GPT(size, tokenizer.VOCAB_SIZE), tmp_path / "model")
    done = run(
        "from folio.cli import main, sample\n"
        f"sample.sample('a', {str(tmp_path / 'model')!r}, tokens=2)\n"
        "print('imported', *sys.modules)\n"
    )
    imported = done.stdout.partition("\nimported ")[2].split()
    assert "folio.inference.decoder" in imported, done.stderr
    unneeded = {"mlflow", "sqlalchemy", "pandas", "matplotlib", "transformers", "dvc", "gradio"}
    assert not unneeded & {*imported}
    assert not {"folio.training", "torch._dynamo", "torch._inductor"} & {*imported}


def test_train_imports_only_what_it_needs():
    done = run("import stages.train; print(*sys.modules)")
    imported = done.stdout.split()
    assert "folio.tracking.logger" in imported, done.stderr
    unneeded = {"matplotlib", "transformers", "dvc", "gradio", "optuna", "huggingface_hub", "typer"}
    assert not unneeded & {*imported}
    assert not {"folio.tracking.store", "torch._dynamo", "torch._inductor"} & {*imported}
