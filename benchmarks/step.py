"""A training step in Folio, nanoGPT, llm.c and transformers: forward, backward, clipping, AdamW.

    python -m benchmarks.step --nanogpt ../nanoGPT              the model in params.yaml
    python -m benchmarks.step --variant seed-30m --nanogpt ../nanoGPT
    python -m benchmarks.step --variant gpt2-124m --nanogpt ../nanoGPT --llmc ../llm.c

All use the same model size, batch size and precision, no dropout, and random tokens. Each contender
trains in a separate process, as it would in normal use, and they take turns; while it waits, it
frees the GPU memory of its activations.

--nanogpt is the path to a clone of github.com/karpathy/nanoGPT, and --llmc that of a clone of
github.com/karpathy/llm.c with the program that benchmarks/llmc.py describes.
"""

import argparse
import contextlib
import importlib.util
import io
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks import llmc
from folio import device, params
from folio.errors import UserError, one_line_errors
from folio.gpt.fused import fp8
from folio.gpt.model import GPT, ModelParams
from folio.sweeps import variants
from folio.tokens import tokenizer, vocabulary
from folio.tokens.batches import Batches
from folio.training import optimizers
from folio.training.step import TrainStep
from folio.training.weights import Weights

RATE, WEIGHT_DECAY, BETAS, CLIP = 3e-4, 0.1, (0.9, 0.95), 1.0
UNIQUE_TOKENS = 11_234  # in tinyshakespeare's training text


@dataclass(frozen=True)
class Work:
    """The training task that every contender performs."""

    size: ModelParams
    batch_size: int  # windows
    where: torch.device
    precision: str

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Random x, y [B, T]."""
        ids = torch.randint(
            tokenizer.VOCAB_SIZE, (self.batch_size, self.size.block_size + 1), device=self.where
        )
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def rows(self, tie: bool) -> int:
        """The number of rows in Folio's token embedding; with tie, all unseen tokens share one."""
        return UNIQUE_TOKENS + 1 if tie else tokenizer.VOCAB_SIZE


Step = Callable[[], object]
Build = Callable[[Work], Step]
Contender = Callable[[Work, int, Connection], None]  # steps per round, and see run_contender


@dataclass
class FolioStep:
    """A training step on the next windows of a random text."""

    train: TrainStep
    batches: Batches
    count: int  # windows per step
    first: int = 0  # the number of the next window

    def __call__(self) -> None:
        self.train([self.batches.windows(self.first, self.count)], RATE)
        self.first += self.count


def build_folio(
    work: Work, tie: bool = False, checkpointing: bool = False, **options: Any
) -> FolioStep:
    """options: of TrainStep."""
    device.tune_malloc()
    size = tokenizer.VOCAB_SIZE
    ids = np.arange(UNIQUE_TOKENS if tie else size, dtype=np.uint16)
    known = (
        vocabulary.tied_vocabulary(np.bincount(ids, minlength=size))
        if tie
        else vocabulary.full_vocabulary(size)
    )
    model = GPT(work.size, known.rows, known.multiplicity).to(work.where)
    model.gradient_checkpointing = checkpointing
    optimizer = optimizers.adamw(model.parameters(), WEIGHT_DECAY, BETAS)
    step = TrainStep(Weights(model, work.precision), optimizer, CLIP, **options)
    text = np.random.default_rng(0).integers(len(ids), size=200_000, dtype=np.uint16)
    rows = known.rows_of(text)
    return FolioStep(step, Batches(rows, work.size.block_size, 0, work.where), work.batch_size)


def plain_step(
    work: Work,
    model: torch.nn.Module,
    loss_of: Callable[..., torch.Tensor],
    optimizer: torch.optim.Optimizer,
) -> Step:
    """A plain training step, as in nanoGPT's train.py."""
    x, y = work.batch()
    half = work.precision != "fp32"
    dtype = device.DTYPES[work.precision] if half else None
    autocast = torch.autocast(work.where.type, dtype, enabled=half)

    def step() -> None:
        with autocast:
            loss = loss_of(model, x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def build_nanogpt(
    work: Work,
    clone: Path,
    wrap: Callable[[torch.nn.Module], torch.nn.Module] = lambda model: model,
) -> Step:
    spec = importlib.util.spec_from_file_location("nanogpt", clone / "model.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    p = work.size
    sizes = {"n_layer": p.n_layer, "n_head": p.n_head, "n_embd": p.n_embd, "bias": True}
    kind = work.where.type
    with contextlib.redirect_stdout(io.StringIO()):
        config = module.GPTConfig(block_size=p.block_size, vocab_size=50304, dropout=0.0, **sizes)
        model: Any = module.GPT(config).to(work.where)
        optimizer = model.configure_optimizers(WEIGHT_DECAY, RATE, BETAS, kind)
    model = torch.compile(model) if kind == "cuda" else model
    return plain_step(work, wrap(model), lambda model, x, y: model(x, y)[1], optimizer)


def build_transformers(work: Work) -> Step:
    from transformers import GPT2Config, GPT2LMHeadModel

    p = work.size
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"n_layer": p.n_layer, "n_head": p.n_head, "n_embd": p.n_embd}
    config = GPT2Config(n_positions=p.block_size, use_cache=False, **sizes, **dropout)
    model: Any = GPT2LMHeadModel(config).to(work.where)
    fused = work.where.type == "cuda"
    optimizer = torch.optim.AdamW(
        model.parameters(), RATE, BETAS, weight_decay=WEIGHT_DECAY, fused=fused
    )
    model = torch.compile(model) if fused else model
    # transformers shifts the labels itself, so they are x, and a window has one target fewer.
    return plain_step(work, model, lambda model, x, y: model(x, labels=x).loss, optimizer)


def run_contender(build: Build, work: Work, steps: int, pipe: Connection) -> None:
    """Run in a contender's process: whenever True is received, run some steps and send their
    ms/step; at the end, send the peak memory in GB."""

    def free() -> None:
        """Between two rounds, others can use the GPU memory of the activations."""
        if isinstance(step, FolioStep):
            step.train.release_graph()
        torch.cuda.empty_cache()

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    step, wait = build(work), torch.cuda.synchronize if work.where.type == "cuda" else lambda: None
    for _ in range(2):
        step()
    free()
    while pipe.recv():
        step()  # not timed: allocates the memory again, and captures Folio's CUDA graph
        wait()
        started = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        taken = 1000 * (time.perf_counter() - started) / steps
        free()
        pipe.send(taken)
    pipe.send(torch.cuda.max_memory_allocated() / 1e9 if work.where.type == "cuda" else 0.0)


def measure_in_turn(
    contenders: dict[str, Contender], work: Work, rounds: int, steps: int
) -> dict[str, tuple[float, float]]:
    """The median ms/step and the peak memory in GB of each contender, after a warm-up round."""

    def ask(name: str, for_a_round: bool) -> float:
        try:
            pipes[name].send(for_a_round)
            answer = pipes[name].recv()
        except (EOFError, ConnectionError):
            raise UserError(f"{name}: its process has ended; its error is above") from None
        if isinstance(answer, UserError):
            raise answer
        return answer

    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    times: dict[str, list[float]] = {}
    for name, contender in contenders.items():
        pipes[name], end = context.Pipe()
        context.Process(target=contender, args=(work, steps, end), daemon=True).start()
        end.close()
        times[name] = []
    for _ in range(rounds + 1):
        for name, taken in times.items():
            taken.append(ask(name, True))
    return {name: (median(times[name][1:]), ask(name, False)) for name in contenders}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that read_options reads."""
    parser.add_argument("--variant", help="one of the files in variants/, without .yaml")
    parser.add_argument("--batch", type=int, help="windows per batch; default: the variant's")


def read_options(options: argparse.Namespace) -> tuple[Work, str]:
    """The work that the options describe, and a title with its dimensions.

    Raises UserError if a number is not positive.
    """
    for name in ("batch", "rounds", "steps"):
        if (number := getattr(options, name, None)) is not None and number < 1:
            raise UserError(f"--{name} is {number}: it must be at least 1")
    tree = yaml.safe_load(params.FILE.read_text())
    for name, value in (variants.read(options.variant) if options.variant else {}).items():
        section, key = name.split(".")
        tree[section][key] = value
    where = device.resolve_device("auto")
    size = ModelParams(**tree["model"] | {"dropout": 0.0})
    batch_size = options.batch or tree["train"]["batch_size"]
    work = Work(size, batch_size, where, device.resolve_precision("auto", where))
    return work, f"{size.n_layer}/{size.n_head}/{size.n_embd}, B={batch_size}, T={size.block_size}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--nanogpt", type=Path, help="the path of a clone of nanoGPT")
    parser.add_argument("--llmc", type=Path, help="the path of a clone of llm.c, see llmc.py")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, help="steps per round; default: 3, or 20 on a GPU")
    parser.add_argument("--contenders", nargs="*", help="names of contenders; default: all")
    parser.add_argument(
        "--checkpointing", action="store_true", help="also Folio with gradient checkpointing"
    )
    options = parser.parse_args()
    if options.nanogpt and not (options.nanogpt / "model.py").exists():
        parser.error(f"--nanogpt: {options.nanogpt} is not a clone of nanoGPT: it has no model.py")
    work, title = read_options(options)
    builds: dict[str, Build] = {}
    if options.nanogpt:
        builds["nanoGPT"] = partial(build_nanogpt, clone=options.nanogpt)
    builds |= {"transformers": build_transformers, "Folio": build_folio}
    if work.where.type == "cuda":
        builds["Folio, deterministic: false"] = partial(build_folio, exact=False)
        if fp8.supports(work.where):
            builds["Folio, fp8 head"] = partial(build_folio, fp8_head=True)
        builds["Folio, compiled"] = partial(build_folio, fused=False, compiled=True)
        builds["Folio, plain"] = partial(build_folio, fused=False)
    if options.checkpointing:
        name = "Folio, gradient checkpointing"
        builds[name] = partial(build_folio, checkpointing=True)
    builds["Folio, unseen tokens tied"] = partial(build_folio, tie=True)
    contenders: dict[str, Contender] = {}
    if options.llmc:
        contenders = llmc.contenders(options.llmc, work, RATE, WEIGHT_DECAY, UNIQUE_TOKENS)
    contenders |= {name: partial(run_contender, build) for name, build in builds.items()}
    for name in options.contenders or contenders:
        if name not in contenders:
            parser.error(f"--contenders: {name!r} is not one of {', '.join(contenders)}")
    contenders = {name: contenders[name] for name in options.contenders or contenders}
    steps = options.steps or (20 if work.where.type == "cuda" else 3)
    on = f"{work.precision}, {device.describe(work.where)}, PyTorch {torch.__version__}"
    print(f"{title}, {on}; medians, rounds: {options.rounds}")
    results = measure_in_turn(contenders, work, options.rounds, steps)
    peers = [name for name in results if name == "Folio" or not name.startswith("Folio")]
    width = max(map(len, results))
    speeds = (f"  vs. {p}" for p in peers)
    print(f"{'':{width}}    ms/step   tokens/s   peak GB", *speeds, sep="")
    for name, (ms, peak) in results.items():
        speed = 1000 * work.batch_size * work.size.block_size / ms
        ratios = "".join(f"{results[p][0] / ms:{6 + len(p)}.2f}" for p in peers)
        print(f"{name:<{width}}{ms:11.2f}{speed:11,.0f}{peak:10.2f}{ratios}")


if __name__ == "__main__":
    with one_line_errors():
        main()
