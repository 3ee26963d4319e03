"""Where the arithmetic runs, in which precision, and the seed."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment

from folio import device
from folio.errors import UserError

CPU = torch.device("cpu")


def test_an_accelerator_that_is_not_there_is_one_line_with_the_way_out():
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    missing = [name for name, is_there in there.items() if not is_there]
    assert missing  # no machine has both
    for name in missing:
        with pytest.raises(UserError, match=f"runtime.device: {name}, but PyTorch sees none here"):
            device.resolve_device(name)
    if len(missing) == 2:
        with pytest.raises(UserError, match=r"take auto or cpu$"):
            device.resolve_device("cuda")


def test_auto_is_the_first_accelerator_that_is_there_and_computes():
    found = device.resolve_device("auto")
    assert torch.ones(2, device=found).sum().item() == 2
    if found.type == "cpu":
        assert not torch.cuda.is_available() and not torch.backends.mps.is_available()


def test_the_cpu_is_always_there():
    assert device.resolve_device("cpu") == CPU
    assert device.describe(CPU) == f"cpu, {torch.get_num_threads()} threads"


def test_auto_precision_is_fp32_on_a_cpu_and_any_other_is_taken_as_it_is():
    assert device.resolve_precision("auto", CPU) == "fp32"
    for precision in ["bf16", "fp16", "fp32"]:
        assert device.resolve_precision(precision, CPU) == precision


def test_the_same_seed_gives_the_same_numbers():
    def numbers(seed):
        device.seed(seed)
        return torch.rand(5)

    assert torch.equal(numbers(1), numbers(1))
    assert not torch.equal(numbers(1), numbers(2))


def test_memory_that_is_kept_is_not_cleared_anew_at_each_step():
    code = """
import resource, torch
from folio import device

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(40 << 18)  # 40 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

handed_back = page_faults()
device.tune_malloc()
for _ in range(5):  # by and by the free blocks become large enough for an aligned one
    page_faults()
assert page_faults() < handed_back / 10
"""
    assert subprocess.run([sys.executable, "-c", code], env=environment(ROOT)).returncode == 0


def test_the_chances_of_a_step_depend_on_the_seed_and_its_number_alone():
    def numbers(seed, step):
        device.seed_step(seed, step, CPU)
        return torch.rand(5)

    torch.rand(3)
    first = numbers(1, 1)
    assert torch.equal(numbers(1, 1), first)
    assert not torch.equal(numbers(1, 2), first) and not torch.equal(numbers(2, 1), first)
