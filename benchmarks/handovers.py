"""How long a token of fused decoding takes, by how each kernel takes over from the one before it.

    python -m benchmarks.handovers --size 12/12/768

Compares the settings of folio/inference/handover.py. For each, prints the time per token in the
second half of a text; and the same if all layers have the weights of the first, which then are in
the GPU's cache: what remains is the latency of the kernels, and reading the head. The texts of all
settings must be equal. Then prints the time per token with sampling, and the time of each kernel if
none starts early. Requires a GPU, and no data.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.generate import PROMPT_TOKENS, VOCAB_SIZE, build_model, parse_size, weight_matrices
from folio import device
from folio.errors import UserError, one_line_errors
from folio.gpt.model import GPT
from folio.inference import handover
from folio.inference.fused_decoder import FusedDecoder, can_fuse

# The slowest and safest first: the name, EARLY, POLL, PREFETCH.
SETTINGS = [
    ("each after the end of the one before", False, False, False),
    ("early, waiting for that end", True, False, False),
    ("early, waiting for that end, prefetch", True, False, True),
    ("early, waiting for tags", True, True, False),
    ("early, waiting for tags, prefetch", True, True, True),
]
GREEDY, SAMPLING = (0.0, None, None), (0.8, None, 0.95)  # temperature, top_k, top_p
PROFILED = 20  # tokens


def write(
    decoder: FusedDecoder, model: GPT, prompts: torch.Tensor, tokens: int
) -> tuple[list[list[int]], float]:
    """The ids of a text for each prompt, and the seconds per token in its second half."""
    ids = []
    for number, new in enumerate(decoder.generate(model, prompts, tokens)):
        ids.append(new)
        if number == tokens // 2:
            torch.cuda.synchronize()
            started = time.perf_counter()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / (tokens - 1 - tokens // 2)
    return torch.stack(ids, 1).tolist(), seconds


def kernel_times(decoder: FusedDecoder, model: GPT, prompts: torch.Tensor) -> dict[str, list]:
    """The times in us of each kernel of PROFILED tokens, by its name and number of programs."""
    write(decoder, model, prompts, 4)
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        write(decoder, model, prompts, PROFILED)
    times = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        recorded.export_chrome_trace(str(Path(folder, "trace.json")))
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    for event in events:
        if event.get("cat") == "kernel":
            times[f"{event['name'][:50]} {event['args']['grid'][0]}"].append(event["dur"])
    return times


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--size", type=parse_size, default="12/12/768", metavar="layers/heads/width"
    )
    parser.add_argument("--batches", type=int, nargs="*", default=[1])
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--precision", default="bf16", choices=device.DTYPES)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    where = device.resolve_device("auto")
    if where.type != "cuda":
        raise UserError("this measures kernels of a GPU, and PyTorch found no GPU on this machine")
    model = build_model(options.size, 1_024, where, device.DTYPES[options.precision])
    if not can_fuse(model):
        raise UserError("the kernels need Triton, and heads of 16, 32, 64 or 128 channels")
    megabytes = sum(p.nbytes for p in weight_matrices(model)) / 1e6
    print(f"on {device.describe(where)}; {megabytes:.0f} MB of weights, us per token")
    torch.manual_seed(2)
    for batch in options.batches:
        prompts = torch.randint(VOCAB_SIZE, (batch, PROMPT_TOKENS), device=where)
        texts = []
        for name, handover.EARLY, handover.POLL, handover.PREFETCH in SETTINGS:
            decoder = FusedDecoder(model, batch, GREEDY)
            shared = FusedDecoder(model, batch, GREEDY)
            shared.blocks = shared.blocks[:1] * len(shared.blocks)
            found = [write(decoder, model, prompts, options.tokens) for _ in range(options.rounds)]
            other = [write(shared, model, prompts, options.tokens) for _ in range(options.rounds)]
            texts += [text for text, _ in found]
            whole, cached = (1e6 * median(s for _, s in each) for each in (found, other))
            line = f"batch {batch:2} {name:<38} {whole:7.1f}, one layer's weights {cached:7.1f}"
            print(line, flush=True)
        equal = "equal" if all(text == texts[0] for text in texts) else "DIFFERENT"
        print(f"batch {batch:2} the texts are {equal}", flush=True)
    prompts = torch.randint(VOCAB_SIZE, (1, PROMPT_TOKENS), device=where)
    _, seconds = write(FusedDecoder(model, 1, SAMPLING), model, prompts, options.tokens)
    print(f"batch  1 sampling, the last setting: {1e6 * seconds:.1f}", flush=True)
    handover.EARLY = handover.POLL = False
    times = kernel_times(FusedDecoder(model, 1, GREEDY), model, prompts)
    for name, taken in sorted(times.items(), key=lambda item: -sum(item[1])):
        print(f"{len(taken) / PROFILED:6.1f} a token, {median(taken):7.2f} us each: {name}")


if __name__ == "__main__":
    with one_line_errors():
        main()
