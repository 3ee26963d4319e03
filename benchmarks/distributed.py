"""Training on several GPUs of a machine: speed, memory and communication, beside nanoGPT's DDP.

    python -m benchmarks.distributed --nanogpt ../nanoGPT
    python -m benchmarks.distributed --tiny                  on a CPU, in a minute

Prints three tables (--parts): the bandwidth of NCCL's operations; the speed of gpt2-124m on one GPU
and on all of them with the same work per GPU; and the speed and memory of gpt2-xl, sharded on all
GPUs and on one GPU, with the largest micro-batch that fits. Steps are those of the train stage,
without dropout and on random tokens. On the same GPUs, the numbers of GPUs take turns, and the
figures are medians.
"""

import argparse
import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import yaml
from torch.nn.parallel import DistributedDataParallel

from benchmarks.bandwidth import measure_bandwidth
from benchmarks.step import Work, build_nanogpt
from benchmarks.team import OUT_OF_MEMORY, Team, TeamError, seconds_per_call
from folio import device, params
from folio.distributed import Group
from folio.errors import one_line_errors
from folio.gpt.model import ModelParams
from folio.sweeps import variants
from folio.tokens import tokenizer
from folio.tokens.token_files import TokenData
from folio.training.params import TrainParams
from folio.training.trainer import Trainer

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32}
# Windows per GPU to try, the largest first, until one fits.
XL_WINDOWS = {"one": [16, 12, 8, 4, 2, 1], "all": [24, 16, 12, 8, 4, 2, 1]}
XL_CHECKPOINTED = 32  # windows per GPU, with gradient checkpointing


@dataclass(frozen=True)
class Setting:
    """What a process trains: its share of a model's training."""

    size: ModelParams
    windows: int  # per step, in this process
    precision: str
    seconds: float  # of steps in a round, about
    parallel: str = "ddp"
    compile: str = "always"
    checkpointing: bool = False
    deterministic: bool = True


@dataclass(frozen=True)
class Speed:
    """A setting's speed and memory on some number of GPUs."""

    gpus: int
    ms: float  # per step
    tokens: float  # per second, on all GPUs together
    allocated: float  # peak of the tensors on a GPU, GB
    reserved: float  # peak of what PyTorch holds on a GPU, GB


def train_task(setting: Setting, group: Group, where: torch.device) -> Callable[..., Any]:
    """A process of Folio's training. See Team."""
    tree = yaml.safe_load(params.FILE.read_text())
    settings = {
        "batch_size": setting.windows,
        "accumulation": group.count,
        "precision": setting.precision,
        "parallel": setting.parallel,
        "compile": setting.compile,
        "gradient_checkpointing": setting.checkpointing,
        "deterministic": setting.deterministic,
        "tie_unseen_tokens": False,
        "unseen_probability": 0.0,
        "optimizer": "adamw",  # as nanoGPT; Muon and factored updates cannot be sharded
        "factored_embedding": False,
        "learning_rate": 1e-4,
    }
    ids = np.random.default_rng(0).integers(tokenizer.VOCAB_SIZE, size=2_000_000, dtype=np.uint16)
    data = TokenData(
        train=ids,
        val=ids[:10_000],
        meta={"vocabulary": tokenizer.VOCAB_SIZE},
        digest="",
        train_counts=np.bincount(ids, minlength=tokenizer.VOCAB_SIZE),
    )
    with where:  # random weights are drawn on the GPU
        trainer = Trainer(
            *(setting.size, TrainParams(**tree["train"] | settings), data, where),
            *(setting.precision, None, group),
        )
    numbers = itertools.count()

    def step() -> None:
        number = next(numbers)
        trainer.step(trainer.batches(number), trainer.learning_rate(number))

    return _answer(step, group, where, check=trainer.read)


def nanogpt_task(
    setting: Setting, clone: Path, group: Group, where: torch.device
) -> Callable[..., Any]:
    """A process of nanoGPT's training: its model, compiled, in DistributedDataParallel."""

    def wrap(model: torch.nn.Module) -> torch.nn.Module:
        if group.count == 1:
            return model
        return DistributedDataParallel(
            model, device_ids=[group.local_rank] if where.type == "cuda" else None
        )

    work = Work(setting.size, setting.windows, where, setting.precision)
    return _answer(build_nanogpt(work, clone, wrap), group, where)


def _answer(
    step: Callable[[], object],
    group: Group,
    where: torch.device,
    check: Callable[[], object] = lambda: None,
) -> Callable[..., Any]:
    """Answers: the seconds per step in some number of steps, and the peak memory in GB."""
    for _ in range(3):
        step()

    def answer(steps: int) -> tuple[float, float, float]:
        seconds = seconds_per_call(step, steps, group, where)
        check()
        if where.type != "cuda":
            return seconds, 0.0, 0.0
        peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return seconds, peaks[0] / 1e9, peaks[1] / 1e9

    return answer


def measure(teams: dict[int, Team], setting: Setting, rounds: int) -> dict[int, Speed]:
    """The speed of teams that take turns, by their number of GPUs. The first round warms up."""
    found: dict[int, list[tuple[float, float, float]]] = {gpus: [] for gpus in teams}
    steps = 1
    for number in range(rounds + 1):
        for gpus, team in teams.items():
            answers = team.ask(steps)
            found[gpus].append(tuple(max(values) for values in zip(*answers, strict=True)))
        if number == 0:
            slowest = max(each[0][0] for each in found.values())
            steps = max(1, min(100, round(setting.seconds / slowest)))
    result = {}
    for gpus, answers in found.items():
        seconds = median(each[0] for each in answers[1:])
        tokens = gpus * setting.windows * setting.size.block_size / seconds
        result[gpus] = Speed(gpus, 1000 * seconds, tokens, *answers[-1][1:])
    return result


def compare_speed(
    setting: Setting, gpus: int, contenders: dict[str, Any], rounds: int, deadline: float
) -> None:
    p = setting.size
    print(
        f"\n{p.n_layer}/{p.n_head}/{p.n_embd}, T={p.block_size}, {setting.windows} windows per GPU"
        f" and step; medians, rounds: {rounds}"
    )
    width = max(map(len, contenders))
    print(f"{'':{width}}  GPUs    ms/step   tokens/s  peak GB  reserved  efficiency")
    for name, task in contenders.items():
        if time.monotonic() > deadline:
            print(f"{name}: left out, to end in time (--minutes)")
            continue
        try:
            with contextlib.ExitStack() as running:
                counts = sorted({1, gpus})
                teams = {count: running.enter_context(Team(count, task)) for count in counts}
                speeds = measure(teams, setting, rounds)
        except TeamError as problem:
            print(f"{name}: {problem}", flush=True)
            continue
        for each in speeds.values():
            shown = each.gpus > 1 and torch.cuda.is_available()  # on a CPU, processes share cores
            share = f"{each.tokens / each.gpus / speeds[1].tokens:12.1%}" if shown else ""
            print(f"{name:<{width}}{_cells(each)}{share}", flush=True)


def measure_xl(setting: Setting, gpus: int, windows: dict[str, list[int]], deadline: float) -> None:
    """The largest micro-batch that fits, sharded on all GPUs and on one; and with gradient
    checkpointing, the same work per GPU on both."""
    p = setting.size
    print(f"\n{p.n_layer}/{p.n_head}/{p.n_embd}, T={p.block_size}; sharded on {gpus} GPUs")
    print(
        "windows  checkpointing   compile  GPUs    ms/step   tokens/s  peak GB  reserved",
        flush=True,
    )
    checkpointed = min(XL_CHECKPOINTED, 2 * windows["one"][0])
    recomputing = replace(setting, checkpointing=True, compile="never", windows=checkpointed)

    def attempt(gpus: int, setting: Setting) -> bool:
        """Whether it fits; prints a line."""
        if time.monotonic() > deadline:
            print(f"{_name(setting)}  {gpus:4}  left out, to end in time (--minutes)")
            return True
        setting = replace(setting, parallel="fsdp" if gpus > 1 else "auto")
        try:
            with Team(gpus, partial(train_task, setting)) as team:
                speed = measure({gpus: team}, setting, rounds=3)[gpus]
        except TeamError as problem:
            print(f"{_name(setting)}  {gpus:4}  {problem}", flush=True)
            return str(problem) != OUT_OF_MEMORY
        print(f"{_name(setting)}{_cells(speed)}", flush=True)
        return True

    def largest(gpus: int, setting: Setting, candidates: list[int]) -> Iterator[Setting]:
        for count in candidates:
            tried = replace(setting, windows=count)
            if attempt(gpus, tried):
                yield tried
                return

    list(largest(gpus, setting, windows["all"]))
    attempt(gpus, recomputing)
    attempt(1, recomputing)
    list(largest(1, setting, windows["one"]))  # with fused kernels, unlike sharded weights


def _name(setting: Setting) -> str:
    checkpointing = "yes" if setting.checkpointing else "no"
    return f"{setting.windows:7}  {checkpointing:>13}  {setting.compile:>8}"


def _cells(speed: Speed) -> str:
    memory = f"{speed.allocated:9.2f}{speed.reserved:10.2f}"
    return f"{speed.gpus:6}{speed.ms:11.2f}{speed.tokens:11,.0f}{memory}"


def read_size(variant: str) -> ModelParams:
    """A variant's size, without dropout."""
    tree = yaml.safe_load(params.FILE.read_text())["model"]
    for name, value in variants.read(variant).items():
        section, key = name.split(".")
        if section == "model":
            tree[key] = value
    return ModelParams(**tree | {"dropout": 0.0})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("bandwidth", "speed", "xl")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--gpus", type=int, help="default: all; without a GPU, 2 processes")
    parser.add_argument("--variant", default="gpt2-124m", help="for the second table")
    parser.add_argument("--windows", type=int, default=32, help="per GPU, for the second table")
    parser.add_argument("--nanogpt", type=Path, help="the path of a clone of nanoGPT")
    parser.add_argument("--varying", action="store_true", help="also deterministic: false")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=9, help="start nothing in the last two")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script")
    options = parser.parse_args()
    if options.nanogpt and not (options.nanogpt / "model.py").exists():
        parser.error(f"--nanogpt: {options.nanogpt} is not a clone of nanoGPT: it has no model.py")
    deadline = time.monotonic() + 60 * max(options.minutes - 2, 0)
    where = device.resolve_device("auto")
    gpus = options.gpus or (torch.cuda.device_count() if where.type == "cuda" else 2)
    precision = device.resolve_precision("auto", where)
    tiny, seconds = (ModelParams(**TINY, dropout=0.0), 0.3) if options.tiny else (None, 3.0)
    on = f"{device.describe(where)}, PyTorch {torch.__version__}"
    print(f"{gpus} x {on}, {precision}")
    if "bandwidth" in options.parts and gpus > 1:
        measure_bandwidth(gpus, most=10**7 if tiny else 10**9)
    if "speed" in options.parts:
        windows = 2 if tiny else options.windows
        setting = Setting(tiny or read_size(options.variant), windows, precision, seconds=seconds)
        contenders = {"Folio": partial(train_task, setting)}
        if options.nanogpt:
            contenders["nanoGPT, DDP"] = partial(nanogpt_task, setting, options.nanogpt.resolve())
        if options.varying:
            varying = replace(setting, deterministic=False)
            contenders["Folio, deterministic: false"] = partial(train_task, varying)
        compare_speed(setting, gpus, contenders, options.rounds, deadline)
    if "xl" in options.parts:
        setting = Setting(tiny or read_size("gpt2-xl"), 1, precision, seconds=seconds)
        measure_xl(setting, gpus, {"one": [2], "all": [4]} if tiny else XL_WINDOWS, deadline)


if __name__ == "__main__":
    with one_line_errors():
        main()
