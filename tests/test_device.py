"""Devices, precision, seeds and the tuning of malloc."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment

from folio import device
from folio.errors import UserError

CPU = torch.device("cpu")


def test_resolve_device_error_for_a_missing_accelerator_names_an_alternative():
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    missing = [name for name, is_available in available.items() if not is_available]
    assert missing  # no machine has both
    for name in missing:
        with pytest.raises(UserError, match=f"runtime.device: PyTorch found no {name} device"):
            device.resolve_device(name)
    if len(missing) == 2:
        with pytest.raises(UserError, match=r"use auto or cpu$"):
            device.resolve_device("cuda")


def test_resolve_device_auto_is_an_available_accelerator_if_there_is_one():
    found = device.resolve_device("auto")
    assert torch.ones(2, device=found).sum().item() == 2
    if found.type == "cpu":
        assert not torch.cuda.is_available() and not torch.backends.mps.is_available()


def test_cpu_is_always_available(monkeypatch):
    assert device.resolve_device("cpu") == CPU
    for threads, words in ((1, "1 thread"), (2, "2 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert device.describe(CPU) == f"cpu, {words}"


def test_resolve_precision_auto_is_fp32_on_a_cpu():
    assert device.resolve_precision("auto", CPU) == "fp32"
    for precision in ["bf16", "fp16", "fp32"]:
        assert device.resolve_precision(precision, CPU) == precision


def test_capture_without_a_gpu_returns_the_function_itself():
    assert device.capture(torch.add, torch.ones(2), torch.ones(2)) is torch.add


def test_seed_determines_the_random_numbers():
    def numbers(seed):
        device.seed(seed)
        return torch.rand(5)

    assert torch.equal(numbers(1), numbers(1))
    assert not torch.equal(numbers(1), numbers(2))


def test_tune_malloc_prevents_page_faults_at_each_step():
    code = """
import resource, torch
from folio import device

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(40 << 18)  # 40 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

untuned = page_faults()
device.tune_malloc()
for _ in range(5):  # until the free blocks are large enough for an aligned one
    page_faults()
assert page_faults() < untuned / 10
"""
    assert subprocess.run([sys.executable, "-c", code], env=environment(ROOT)).returncode == 0


def test_seed_step_depends_only_on_the_seed_and_the_step():
    def numbers(seed, step):
        device.seed_step(seed, step, CPU)
        return torch.rand(5)

    torch.rand(3)
    first = numbers(1, 1)
    assert torch.equal(numbers(1, 1), first)
    assert not torch.equal(numbers(1, 2), first) and not torch.equal(numbers(2, 1), first)
