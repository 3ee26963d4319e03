"""What all benchmarks have in common."""

import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = [
    path.stem
    for path in sorted((ROOT / "benchmarks").glob("*.py"))
    if "__main__" in path.read_text()
]
OTHERS = {"fuzz", "check_entry"}  # pytest handles its errors; it uses nothing of Folio


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in OTHERS])
def test_benchmark_turns_errors_into_one_line(name):
    source = (ROOT / f"benchmarks/{name}.py").read_text()
    assert source.endswith("    with one_line_errors():\n        main()\n")


def test_benchmark_of_gpu_memory_without_a_gpu_is_one_line():
    command = [sys.executable, "-m", "benchmarks.memory", "gpt2-124m"]
    done = subprocess.run(
        command, cwd=ROOT, env={"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        "folio: this measures a GPU's memory, and PyTorch found no GPU on this machine\n"
    )
