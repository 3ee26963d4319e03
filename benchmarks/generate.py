"""How fast text comes: Folio's cache beside transformers' generate, and beside no cache at all.

    python -m benchmarks.generate --tokens 500 --batches 1 64

Greedy, with the seed-30m sizes (6 layers, 6 heads, 384 wide, 50,257 tokens) and random weights
that are shaken, so that the text does not stand still. The two of a row are timed in turn, and
must write the same ids, but where rounding decides between the two likeliest; medians.
transformers ends at its context, so that comparison has a context of 1,024; the other goes
beyond a context of 128. Needs no data.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from folio import device
from folio.gpt import huggingface
from folio.gpt.model import GPT, ModelParams
from folio.inference.generation import generate_batch

ROWS, PROMPT = 50_257, 8  # of the vocabulary; tokens
Way = Callable[[torch.Tensor, int], torch.Tensor]  # prompts [B, T], tokens -> ids [B, tokens]


def gpt(block_size: int, where: torch.device) -> GPT:
    torch.manual_seed(1)
    sizes = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": block_size}
    model = GPT(ModelParams(**sizes, dropout=0.0), ROWS).to(where).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def folio(model: GPT) -> Way:
    def way(prompts: torch.Tensor, tokens: int) -> torch.Tensor:
        return torch.stack([*generate_batch(model, prompts, tokens, 0.0)], 1)

    return way


def transformers(model: GPT, where: torch.device) -> Way:
    with tempfile.TemporaryDirectory() as folder:
        huggingface.save(model, Path(folder) / "gpt2")
        theirs = GPT2LMHeadModel.from_pretrained(Path(folder) / "gpt2").to(where)

    def way(prompts: torch.Tensor, tokens: int) -> torch.Tensor:
        ids = theirs.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=ROWS - 1,
        )
        return ids[:, prompts.shape[1] :]

    return way


def without_cache(model: GPT) -> Way:
    @torch.inference_mode()
    def way(prompts: torch.Tensor, tokens: int) -> torch.Tensor:
        ids = prompts
        for _ in range(tokens):
            likeliest = model(ids[:, -model.params.block_size :])[:, -1].argmax(-1)
            ids = torch.cat([ids, likeliest[:, None]], 1)
        return ids[:, prompts.shape[1] :]

    return way


@torch.inference_mode()
def gap(model: GPT, prompt: torch.Tensor, text: list[int], other: list[int]) -> float:
    """By how much of the logits' deviation the first two ids that differ are apart; 0: none do."""
    place = next((i for i, ids in enumerate(zip(text, other, strict=True)) if len({*ids}) > 1), -1)
    if place < 0:
        return 0.0
    read = torch.cat([prompt, prompt.new_tensor(text[:place])])[None, -model.params.block_size :]
    logits = model(read)[0, -1]
    return ((logits[text[place]] - logits[other[place]]).abs() / logits.std()).item()


def compare(name: str, model: GPT, theirs: Way, prompts: torch.Tensor, tokens: int, rounds: int):
    """Print a row; exit if the ids are not the same, but for two that rounding alone decides."""
    ours = folio(model)
    ours(prompts, 8), theirs(prompts, 8)
    seconds, ids = {ours: [], theirs: []}, {}
    for _ in range(rounds):
        for way in (ours, theirs):
            started = time.perf_counter()
            ids[way] = way(prompts, tokens).tolist()  # waits for the device
            seconds[way].append(time.perf_counter() - started)
    equal = sum(a == b for a, b in zip(ids[ours], ids[theirs], strict=True))
    speeds = [len(prompts) * tokens / median(taken) for taken in seconds.values()]
    distinct = min(len(set(row)) for row in ids[ours])
    print(
        f"{name:<34} {len(prompts):5} {tokens:6} {speeds[0]:9,.0f} {speeds[1]:9,.0f}"
        f" {speeds[0] / speeds[1]:6.2f}   {equal} of {len(prompts)} ({distinct} distinct ids)",
        flush=True,
    )
    widest = max(map(gap, [model] * len(prompts), prompts, ids[ours], ids[theirs]))
    if widest > 1e-5:
        sys.exit(f"the texts differ where two logits are {widest:.1e} deviations apart")
    if widest:
        print(f"where texts part, two logits are at most {widest:.1e} deviations apart: a tie")


@torch.inference_mode()
def floor(model: GPT, where: torch.device, rounds: int) -> tuple[float, float]:
    """All matrices once, in ms: added up, which is reading; and times a vector with F.linear."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and ".wpe." not in name]
    vectors = [torch.randn(1, p.shape[1], device=where) for p in matrices]
    taken = {"read": [], "linear": []}
    for _ in range(10 * rounds):
        for name, times in taken.items():
            started = time.perf_counter()
            for p, x in zip(matrices, vectors, strict=True):
                last = p.sum() if name == "read" else F.linear(x, p)
            last.cpu()
            times.append(1e3 * (time.perf_counter() - started))
    return median(taken["read"]), median(taken["linear"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 64])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    where, tokens, rounds = device.resolve_device(options.device), options.tokens, options.rounds
    torch.manual_seed(2)
    prompts = torch.randint(ROWS, (max([1, *options.batches]), PROMPT), device=where)
    print(f"on {device.describe(where)}; tokens/s, medians of {rounds}")
    print(f"{'Folio beside':<34} batch tokens     Folio     other  ratio   the same text")
    model = gpt(1_024, where)
    theirs = transformers(model, where)
    for batch in options.batches:
        name = "transformers, context 1,024"
        compare(name, model, theirs, prompts[:batch], tokens, rounds)
    read, linear = floor(model, where, rounds)
    short = gpt(128, where)
    name = "no cache, beyond a context of 128"
    compare(name, short, without_cache(short), prompts[:1], tokens, rounds)
    print(f"a token's weights, 120 MB: {read:.2f} ms to read, {linear:.2f} ms through F.linear")


if __name__ == "__main__":
    main()
