"""The speed of generation: Folio compared with transformers, and with generation without a cache.

    python -m benchmarks.generate --tokens 500 --batches 1 64

Uses greedy decoding with a model of seed-30m's size (6 layers, 6 heads, width 384, 50,257 tokens)
and random weights, perturbed so that the text does not repeat a single token. The two contenders in
a row are timed in turn; prints medians. They must generate the same ids, except where rounding
decides between the two most likely tokens. transformers cannot generate beyond the model's context,
so that comparison uses a context of 1,024; the other one goes beyond a context of 128.
Requires no data.
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
from folio.errors import one_line_errors
from folio.gpt import huggingface
from folio.gpt.model import GPT, ModelParams
from folio.inference.generation import generate_batch

VOCAB_SIZE, PROMPT_TOKENS = 50_257, 8
Generate = Callable[[torch.Tensor, int], torch.Tensor]  # prompts [B, T], n -> ids [B, n]


def build_model(block_size: int, where: torch.device) -> GPT:
    torch.manual_seed(1)
    sizes = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": block_size}
    model = GPT(ModelParams(**sizes, dropout=0.0), VOCAB_SIZE).to(where).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def with_folio(model: GPT) -> Generate:
    def generate(prompts: torch.Tensor, tokens: int) -> torch.Tensor:
        return torch.stack([*generate_batch(model, prompts, tokens, 0.0)], 1)

    return generate


def with_transformers(model: GPT, where: torch.device) -> Generate:
    with tempfile.TemporaryDirectory() as folder:
        huggingface.save(model, Path(folder) / "gpt2")
        theirs = GPT2LMHeadModel.from_pretrained(Path(folder) / "gpt2").to(where)

    def generate(prompts: torch.Tensor, tokens: int) -> torch.Tensor:
        ids = theirs.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=VOCAB_SIZE - 1,
        )
        return ids[:, prompts.shape[1] :]

    return generate


def without_cache(model: GPT) -> Generate:
    @torch.inference_mode()
    def generate(prompts: torch.Tensor, tokens: int) -> torch.Tensor:
        ids = prompts
        for _ in range(tokens):
            next_ids = model(ids[:, -model.params.block_size :])[:, -1].argmax(-1)
            ids = torch.cat([ids, next_ids[:, None]], 1)
        return ids[:, prompts.shape[1] :]

    return generate


@torch.inference_mode()
def gap(model: GPT, prompt: torch.Tensor, text: list[int], other: list[int]) -> float:
    """The difference between the logits of the two ids where the texts first differ, in standard
    deviations of the logits; 0 if the texts are equal."""
    pairs = enumerate(zip(text, other, strict=True))
    i = next((i for i, (a, b) in pairs if a != b), -1)
    if i < 0:
        return 0.0
    context = torch.cat([prompt, prompt.new_tensor(text[:i])])[None, -model.params.block_size :]
    logits = model(context)[0, -1]
    return ((logits[text[i]] - logits[other[i]]).abs() / logits.std()).item()


def compare(
    name: str, model: GPT, other: Generate, prompts: torch.Tensor, tokens: int, rounds: int
) -> None:
    """Print a row. Exit if the ids differ by more than rounding can explain."""
    ours = with_folio(model)
    ours(prompts, 8), other(prompts, 8)
    seconds: dict[Generate, list[float]] = {ours: [], other: []}
    ids: dict[Generate, list[list[int]]] = {}
    for _ in range(rounds):
        for contender in (ours, other):
            started = time.perf_counter()
            ids[contender] = contender(prompts, tokens).tolist()  # waits for the device
            seconds[contender].append(time.perf_counter() - started)
    equal = sum(a == b for a, b in zip(ids[ours], ids[other], strict=True))
    speeds = [len(prompts) * tokens / median(taken) for taken in seconds.values()]
    distinct = min(len(set(row)) for row in ids[ours])
    print(
        f"{name:<34} {len(prompts):5} {tokens:6} {speeds[0]:9,.0f} {speeds[1]:9,.0f}"
        f" {speeds[0] / speeds[1]:6.2f}   {equal} of {len(prompts)} ({distinct} distinct ids)",
        flush=True,
    )
    widest = max(map(gap, [model] * len(prompts), prompts, ids[ours], ids[other]))
    if widest > 1e-5:
        sys.exit(f"the texts differ where the logits differ by {widest:.1e} standard deviations")
    if widest:
        print(f"where texts differ, the logits differ by {widest:.1e} standard deviations: a tie")


@torch.inference_mode()
def floor(model: GPT, where: torch.device, rounds: int) -> tuple[float, float]:
    """The time in ms to read all weight matrices once (their sum), and to multiply each by a
    vector."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and ".wpe." not in name]
    vectors = [torch.randn(1, p.shape[1], device=where) for p in matrices]
    taken: dict[str, list[float]] = {"read": [], "linear": []}
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
    if min(options.tokens, options.rounds, *options.batches, 1) < 1:
        parser.error("--tokens, --rounds and --batches must be at least 1")
    where, tokens, rounds = device.resolve_device(options.device), options.tokens, options.rounds
    torch.manual_seed(2)
    prompts = torch.randint(VOCAB_SIZE, (max([1, *options.batches]), PROMPT_TOKENS), device=where)
    print(f"on {device.describe(where)}; tokens/s, medians, rounds: {rounds}")
    print(f"{'Folio, compared with':<34} batch tokens     Folio     other  ratio   same text")
    model = build_model(1_024, where)
    theirs = with_transformers(model, where)
    for batch in options.batches:
        name = "transformers, context 1,024"
        compare(name, model, theirs, prompts[:batch], tokens, rounds)
    read, linear = floor(model, where, rounds)
    short = build_model(128, where)
    name = "no cache, beyond a context of 128"
    compare(name, short, without_cache(short), prompts[:1], tokens, rounds)
    print(f"per token, 120 MB of weights: {read:.2f} ms to read, {linear:.2f} ms with F.linear")


if __name__ == "__main__":
    with one_line_errors():
        main()
