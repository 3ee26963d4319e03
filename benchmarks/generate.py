"""The speed of generation: Folio compared with transformers, and with generation without a cache.

    python -m benchmarks.generate --tokens 500 --batches 1 64 --precision bf16 --size 12/12/768

Uses greedy decoding with a model of 50,257 tokens, by default of seed-30m's size (6 layers, 6
heads, width 384), with random weights, perturbed so that the text does not repeat a single token.
The two contenders in a row are timed in turn, in the same precision; prints medians. They must
generate the same ids, except where rounding decides between the two most likely tokens.
transformers cannot generate beyond the model's context, so that comparison uses a context of 1,024;
the other one goes beyond a context of 128. At batch 1, a token takes at least as long as reading
the weights from memory: prints which share of that speed Folio reaches. Requires no data.
"""

import argparse
import copy
import re
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
from folio.inference.fused_decoder import can_fuse
from folio.inference.generation import generate_batch

VOCAB_SIZE, PROMPT_TOKENS = 50_257, 8
_BUFFER = 1 << 28  # bytes, more than a cache holds
Generate = Callable[[torch.Tensor, int], torch.Tensor]  # prompts [B, T], n -> ids [B, n]


def parse_size(text: str) -> dict[str, int]:
    """The sizes of a model from "layers/heads/width"."""
    found = re.fullmatch(r"(\d+)/(\d+)/(\d+)", text)
    numbers = [int(part) for part in found.groups()] if found else [0]
    if min(numbers) < 1 or numbers[2] % numbers[1]:
        raise argparse.ArgumentTypeError(
            f"{text}: give layers/heads/width, such as 12/12/768; each head has a part of the width"
        )
    return dict(zip(("n_layer", "n_head", "n_embd"), numbers, strict=True))


def build_model(
    size: dict[str, int], block_size: int, where: torch.device, dtype: torch.dtype
) -> GPT:
    torch.manual_seed(1)
    params = ModelParams(**size, block_size=block_size, dropout=0.0)
    model = GPT(params, VOCAB_SIZE).to(where).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.to(dtype)


def with_folio(model: GPT, fused: bool | None) -> Generate:
    def generate(prompts: torch.Tensor, tokens: int) -> torch.Tensor:
        return torch.stack([*generate_batch(model, prompts, tokens, 0.0, fused=fused)], 1)

    return generate


def with_transformers(model: GPT, where: torch.device) -> Generate:
    with tempfile.TemporaryDirectory() as folder:
        huggingface.save(model, Path(folder) / "gpt2")
        dtype = model.transformer.wte.weight.dtype
        theirs = GPT2LMHeadModel.from_pretrained(Path(folder) / "gpt2", dtype=dtype).to(where)

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
def gap(
    model: GPT, exact: GPT, prompt: torch.Tensor, text: list[int], other: list[int]
) -> tuple[float, float]:
    """The difference between the logits of the two ids where the texts first differ, and how large
    rounding can make it, both in standard deviations of the logits; 0 if the texts are equal.

    exact: the model in fp32, which computes the logits. In half precision, each of the two may be
    off by as much as the model's own logits are anywhere in the vocabulary.
    """
    pairs = enumerate(zip(text, other, strict=True))
    i = next((i for i, (a, b) in pairs if a != b), -1)
    if i < 0:
        return 0.0, 0.0
    context = torch.cat([prompt, prompt.new_tensor(text[:i])])[None, -model.params.block_size :]
    logits = exact(context)[0, -1]
    error = (model(context)[0, -1].float() - logits).abs().max()
    difference = (logits[text[i]] - logits[other[i]]).abs()
    return (difference / logits.std()).item(), max(1e-5, (2 * error / logits.std()).item())


def compare(
    name: str,
    model: GPT,
    other: Generate,
    prompts: torch.Tensor,
    tokens: int,
    rounds: int,
    fused: bool | None,
) -> None:
    """Print a row. Exit if the ids differ by more than rounding can explain."""
    ours = with_folio(model, fused)
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
    exact = copy.deepcopy(model).float()
    texts = zip(prompts, ids[ours], ids[other], strict=True)
    gaps = [gap(model, exact, *each) for each in texts]
    if beyond := [found for found, explained in gaps if found > explained]:
        sys.exit(
            f"the texts differ where the logits differ by {max(beyond):.1e} standard deviations"
        )
    if widest := max(found for found, _ in gaps):
        print(f"where texts differ, the logits differ by {widest:.1e} standard deviations: a tie")


def second_half(
    model: GPT, prompt: torch.Tensor, tokens: int, rounds: int, fused: bool | None
) -> float:
    """The seconds per token in the second half of a text of one prompt [1, T], median: without the
    prompt, and after the first CUDA graphs have been captured."""
    taken = []
    for _ in range(rounds):
        ids = generate_batch(model, prompt, tokens, 0.0, fused=fused)
        for _ in range(tokens // 2):
            next(ids).cpu()
        started = time.perf_counter()
        [*ids][-1].cpu()
        taken.append((time.perf_counter() - started) / (tokens - tokens // 2))
    return median(taken)


def weight_matrices(model: GPT) -> list[torch.Tensor]:
    """The matrices that each token is multiplied by."""
    return [p for name, p in model.named_parameters() if p.dim() == 2 and ".wpe." not in name]


def read_speed(where: torch.device, rounds: int) -> float:
    """How many bytes/s the device reads from memory, measured as the sum of a large buffer."""
    buffer, repeats, taken = torch.ones(_BUFFER // 4, device=where), 10, []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        for _ in range(repeats):
            total = buffer.sum()
        total.cpu()
        taken.append((time.perf_counter() - started) / repeats)
    return _BUFFER / min(taken)


@torch.inference_mode()
def floor(model: GPT, where: torch.device, rounds: int) -> tuple[float, float]:
    """The time in ms to read all weight matrices once (their sum), and to multiply each by a
    vector."""
    matrices = weight_matrices(model)
    vectors = [torch.randn(1, p.shape[1], device=where, dtype=p.dtype) for p in matrices]
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
    parser.add_argument("--precision", default="fp32", choices=device.DTYPES)
    parser.add_argument("--size", type=parse_size, default="6/6/384", metavar="layers/heads/width")
    parser.add_argument("--plain", action="store_true", help="Folio without its fused kernels")
    options = parser.parse_args()
    if min(options.tokens, options.rounds, *options.batches, 1) < 1:
        parser.error("--tokens, --rounds and --batches must be at least 1")
    where, tokens, rounds = device.resolve_device(options.device), options.tokens, options.rounds
    torch.manual_seed(2)
    prompts = torch.randint(VOCAB_SIZE, (max([1, *options.batches]), PROMPT_TOKENS), device=where)
    print(f"on {device.describe(where)}; tokens/s, medians, rounds: {rounds}")
    print(f"{'Folio, compared with':<34} batch tokens     Folio     other  ratio   same text")
    dtype, fused = device.DTYPES[options.precision], False if options.plain else None
    model = build_model(options.size, 1_024, where, dtype)
    kernels = "plain" if options.plain or not can_fuse(model) else "fused"
    print(f"Folio's kernels: {kernels}")
    theirs = with_transformers(model, where)
    for batch in options.batches:
        name = "transformers, context 1,024"
        compare(name, model, theirs, prompts[:batch], tokens, rounds, fused)
    read, linear = floor(model, where, rounds)
    short = build_model(options.size, 128, where, dtype)
    name = "no cache, beyond a context of 128"
    compare(name, short, without_cache(short), prompts[:1], tokens, rounds, fused)
    weights = sum(p.nbytes for p in weight_matrices(model))
    print(
        f"per token, {weights / 1e6:.0f} MB of weights: {read:.2f} ms to read,"
        f" {linear:.2f} ms with F.linear"
    )
    bandwidth = read_speed(where, rounds)
    limit, reached = weights / bandwidth, second_half(model, prompts[:1], tokens, rounds, fused)
    print(
        f"batch 1: {1e6 * reached:,.0f} us per token in the second half of the text; reading"
        f" {weights / 1e6:.0f} MB from memory at {bandwidth / 1e9:,.0f} GB/s takes"
        f" {1e6 * limit:,.0f} us: {limit / reached:.0%} of the memory-bound limit"
    )


if __name__ == "__main__":
    with one_line_errors():
        main()
