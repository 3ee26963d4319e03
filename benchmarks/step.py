"""One training step of Folio beside nanoGPT's and transformers': forward, backward, clip, AdamW.

    python -m benchmarks.step --nanogpt ../nanoGPT              params.yaml's size
    python -m benchmarks.step --variant seed-30m --nanogpt ../nanoGPT

The same sizes, batch and precision, no dropout, random tokens. Each trains in a process of its own,
as its users start it, and they take turns. nanoGPT is a clone of github.com/karpathy/nanoGPT.
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

import numpy as np
import torch
import yaml

from folio import device, params
from folio.sweeps import variants
from folio.tokens import batches, tokenizer, vocabulary
from folio.training import optimizers
from folio.errors import one_line_errors
from folio.gpt.model import GPT, ModelParams
from folio.training.step import Step

RATE, WEIGHT_DECAY, BETAS, CLIP = 3e-4, 0.1, (0.9, 0.95), 1.0
OCCUR = 11_234  # different tokens in tinyshakespeare's training part


@dataclass(frozen=True)
class Work:
    """What every contender is given."""

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
        """Of Folio's token embedding: the unseen tokens share one, or each has its own."""
        return OCCUR + 1 if tie else tokenizer.VOCAB_SIZE


def folio(work: Work, tie: bool = False, **how: bool) -> Callable[[], object]:
    device.tune_malloc()
    size = tokenizer.VOCAB_SIZE
    ids = np.arange(OCCUR if tie else size, dtype=np.uint16)
    known = vocabulary.tied_vocabulary(ids, size) if tie else vocabulary.full_vocabulary(size)
    model = GPT(work.size, known.rows, known.multiplicity).to(work.where)
    optimizer = optimizers.adamw(model, WEIGHT_DECAY, BETAS)
    step = Step(model, optimizer, work.where, work.precision, CLIP, **how)
    text = np.random.default_rng(0).integers(len(ids), size=200_000, dtype=np.uint16)
    batches = batches.Batches(
        known.rows_of(text), work.size.block_size, work.batch_size, 0, work.where
    )
    numbers = iter(range(1 << 30))
    return lambda: step([batches[next(numbers)]], RATE)


def peer_step(work: Work, model, loss_of, optimizer) -> Callable[[], object]:
    """A plain training step, as nanoGPT's train.py has it."""
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


def nanogpt(work: Work, clone: Path) -> Callable[[], object]:
    spec = importlib.util.spec_from_file_location("nanogpt", clone / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    p = work.size
    sizes = {"n_layer": p.n_layer, "n_head": p.n_head, "n_embd": p.n_embd, "bias": True}
    kind = work.where.type
    with contextlib.redirect_stdout(io.StringIO()):
        config = module.GPTConfig(block_size=p.block_size, vocab_size=50304, dropout=0.0, **sizes)
        model = module.GPT(config).to(work.where)
        optimizer = model.configure_optimizers(WEIGHT_DECAY, RATE, BETAS, kind)
    model = torch.compile(model) if kind == "cuda" else model
    return peer_step(work, model, lambda model, x, y: model(x, y)[1], optimizer)


def transformers(work: Work) -> Callable[[], object]:
    from transformers import GPT2Config, GPT2LMHeadModel

    p = work.size
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"n_layer": p.n_layer, "n_head": p.n_head, "n_embd": p.n_embd}
    config = GPT2Config(n_positions=p.block_size, use_cache=False, **sizes, **dropout)
    model = GPT2LMHeadModel(config).to(work.where)
    fused = work.where.type == "cuda"
    optimizer = torch.optim.AdamW(
        model.parameters(), RATE, BETAS, weight_decay=WEIGHT_DECAY, fused=fused
    )
    model = torch.compile(model) if fused else model
    # transformers moves the labels on by one: it is given x, and learns one token less a window.
    return peer_step(work, model, lambda model, x, y: model(x, labels=x).loss, optimizer)


def serve(build: Callable, work: Work, steps: int, pipe: Connection) -> None:
    """In a contender's process: at each word, time some steps and tell the ms of one."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    step, wait = build(work), torch.cuda.synchronize if work.where.type == "cuda" else lambda: None
    for _ in range(3):
        step()
    while pipe.recv():
        wait()
        started = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        pipe.send(1000 * (time.perf_counter() - started) / steps)
    pipe.send(torch.cuda.max_memory_allocated() / 1e9 if work.where.type == "cuda" else 0.0)


def in_turn(contenders: dict[str, Callable], work: Work, rounds: int, steps: int):
    """{name: (median ms a step, peak GB)}; the first round does not count."""
    context, pipes, times = multiprocessing.get_context("spawn"), {}, {}
    for name, build in contenders.items():
        pipes[name], end = context.Pipe()
        context.Process(target=serve, args=(build, work, steps, end), daemon=True).start()
        end.close()
        times[name] = []
    for _ in range(rounds + 1):
        for name, pipe in pipes.items():
            pipe.send(True)
            times[name].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(False)
    return {name: (median(times[name][1:]), pipes[name].recv()) for name in contenders}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What read_options reads."""
    parser.add_argument("--variant", help="one of the files in variants/, without .yaml")
    parser.add_argument("--batch", type=int, help="windows a batch; the variant's own")


def read_options(options: argparse.Namespace) -> tuple[Work, str]:
    """The work, and a title that says what and where it is."""
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
    parser.add_argument("--nanogpt", type=Path, help="a clone of nanoGPT")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, help="a round; 3, on a GPU 20")
    parser.add_argument("--contenders", nargs="*", help="of those it has, by name; all")
    options = parser.parse_args()
    if options.nanogpt and not (options.nanogpt / "model.py").exists():
        parser.error(f"--nanogpt: {options.nanogpt} is no clone of nanoGPT, it has no model.py")
    work, title = read_options(options)
    contenders = {"nanoGPT": partial(nanogpt, clone=options.nanogpt)} if options.nanogpt else {}
    contenders |= {"transformers": transformers, "Folio": folio}
    if work.where.type == "cuda":
        contenders["Folio, compiled"] = partial(folio, compiled=True)
        name = "Folio, compiled, deterministic: false"
        contenders[name] = partial(folio, compiled=True, exact=False)
    contenders["Folio, unseen tokens tied"] = partial(folio, tie=True)
    for name in options.contenders or contenders:
        if name not in contenders:
            parser.error(f"--contenders: no {name!r} among {', '.join(contenders)}")
    contenders = {name: contenders[name] for name in options.contenders or contenders}
    steps = options.steps or (20 if work.where.type == "cuda" else 3)
    on = f"{work.precision}, {device.describe(work.where)}, PyTorch {torch.__version__}"
    print(f"{title}, {on}; medians of {options.rounds} rounds")
    results = in_turn(contenders, work, options.rounds, steps)
    peers = [name for name in results if not name.startswith("Folio")]
    width = max(map(len, results))
    speeds = (f"  speed of {p}" for p in peers)
    print(f"{'':{width}}  ms a step   tokens/s   peak GB", *speeds, sep="")
    for name, (ms, peak) in results.items():
        speed = 1000 * work.batch_size * work.size.block_size / ms
        ratios = "".join(f"{results[p][0] / ms:{11 + len(p)}.2f}" for p in peers)
        print(f"{name:<{width}}{ms:11.2f}{speed:11,.0f}{peak:10.2f}{ratios}")


if __name__ == "__main__":
    with one_line_errors():
        main()
