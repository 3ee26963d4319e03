"""llm.c as a contender of benchmarks/step.py: its program, train_gpt2cu, run from outside.

In a clone of github.com/karpathy/llm.c, build it for the GPU (90: H100 and H200; the Makefile does
not detect it), with cuDNN's attention, for which cudnn-frontend must be cloned into it:

    sed -i -e '/cudaMemAdvise(/d' -e 's/cudaMallocManaged(out, bytes)/err/' llmc/cuda_utils.cuh
    make train_gpt2cu USE_CUDNN=1 NVCC_LDLIBS=-lnvrtc GPU_COMPUTE_CAPABILITY=90 \\
        NO_MULTI_GPU=1 NO_USE_MPI=1

CUDA 13 has changed the arguments of cudaMemAdvise: the first line removes the call, and with it the
memory of the host that llm.c takes if the GPU's does not suffice. Recent versions of cudnn-frontend
need nvrtc. Without USE_CUDNN=1, llm.c stores all attention weights, and is slower.

What differs from the other contenders: the ms/step are those that llm.c prints, from reading a
batch to the end of the update, by the GPU's clock; they leave out the printing between two steps.
The peak is the sum of the allocations that it reports, without the work space of cuBLAS and cuDNN.
The program ends after each round. Weights, gradients and activations have half precision, and
AdamW also keeps the weights in fp32. Clipping and the betas are the same; matrices and embeddings
have weight decay, biases and layer norms none. The position embedding always has 1,024 rows. The
random tokens are as many different ones as in tinyshakespeare: llm.c sorts them on the CPU in each
step, and would wait for that if all the tokens of the vocabulary occurred, as in no text.
"""

import os
import re
import subprocess
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from folio.errors import UserError
from folio.gpt.model import ModelParams

if TYPE_CHECKING:
    from benchmarks.step import Work

PROGRAM = "train_gpt2cu"
CONTEXT = 1024  # the most positions of its models
# Its models of random weights, by layers, heads and width, as gpt2_set_hyperparameters has them.
MODELS = {
    (6, 6, 384): "d6",
    (12, 12, 768): "d12",
    (24, 16, 1024): "d24",
    (36, 20, 1280): "d36",
    (48, 25, 1600): "d48",
}
# The fastest settings: nothing is computed a second time in the backward pass; GELU and its
# gradient run as kernels of their own, or as the last part of the matrix products.
SETTINGS = {"llm.c": ("-r", "0"), "llm.c, GELU fused": ("-r", "0", "-ge", "2")}
HEADER_SIZE, MAGIC, VERSION = 256, 20240520, 1  # of a token file
FILE_BATCHES = 8  # in the token file; beyond them it is read from the start, in another order
PRECISIONS = {"fp32": ("FP32", "TF32"), "fp16": ("FP16",), "bf16": ("BF16",)}

_STEP = re.compile(r"^step +\d+/\d+ \|.*\| (\d+\.\d+) ms \|", re.MULTILINE)
_MEMORY = re.compile(r"^allocat(?:ed|ing) (\d+) MiB for ", re.MULTILINE)
_PRECISION = re.compile(r"^\| precision +\| (\w+) ", re.MULTILINE)


def contenders(
    clone: Path, work: "Work", rate: float, weight_decay: float, unique_tokens: int
) -> dict[str, Any]:
    """The contenders of benchmarks/step.py by name. UserError: a size that llm.c does not have."""
    size = work.size
    if (size.n_layer, size.n_head, size.n_embd) not in MODELS or size.block_size > CONTEXT:
        sizes = ", ".join("/".join(map(str, known)) for known in MODELS)
        raise UserError(
            f"--llmc: llm.c has no model of {size.n_layer}/{size.n_head}/{size.n_embd} with a"
            f" context of {size.block_size:,}: it has {sizes}, with up to {CONTEXT:,}"
        )
    program = (clone / PROGRAM).absolute()
    if not os.access(program, os.X_OK) or not program.is_file():
        raise UserError(
            f"--llmc: {clone} has no program {PROGRAM}: build it there as described in"
            " benchmarks/llmc.py"
        )
    optimizer = ["-l", str(rate), "-c", str(weight_decay), "-k", "constant"]
    return {
        name: partial(run, [str(program), *settings, *optimizer], unique_tokens)
        for name, settings in SETTINGS.items()
    }


def run(command: list[str], unique_tokens: int, work: "Work", steps: int, pipe: Connection) -> None:
    """A contender's process, with the messages of step.run_contender; each round is one run of the
    program. Instead of a time, a UserError is sent if the program fails."""
    with TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.bin"
        count = FILE_BATCHES * work.batch_size * work.size.block_size + 1
        write_tokens(tokens, count, unique_tokens)
        command = [*command, *work_options(work.size, work.batch_size, tokens)]
        peak = 0.0
        while pipe.recv():
            try:
                ms, peak = measure(command, work.precision, steps)
            except UserError as error:
                pipe.send(error)
                return
            pipe.send(ms)
        pipe.send(peak)


def write_tokens(path: Path, count: int, unique: int) -> None:
    """Write a file of random tokens as llm.c reads it: a header of 256 int32, then uint16."""
    header = np.zeros(HEADER_SIZE, np.int32)
    header[:3] = MAGIC, VERSION, count
    tokens = np.random.default_rng(0).integers(unique, size=count, dtype=np.uint16)
    path.write_bytes(header.tobytes() + tokens.tobytes())


def work_options(size: ModelParams, batch_size: int, tokens: Path) -> list[str]:
    """The program's options for the benchmark's work, without evaluation and samples."""
    model = MODELS[size.n_layer, size.n_head, size.n_embd]
    work = ["-e", model, "-b", str(batch_size), "-t", str(size.block_size)]
    # It divides by -v, so 0 does not switch the evaluation off; -m 0 leaves it without batches.
    only_training = ["-v", "1000000", "-m", "0", "-s", "0"]
    return [*work, *only_training, "-i", str(tokens), "-j", str(tokens)]


def measure(command: list[str], precision: str, steps: int) -> tuple[float, float]:
    """Run twice as many steps, of which the first half warms up; their ms/step, and the peak GB."""
    command = [*command, "-x", str(2 * steps)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise UserError(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        message = " ".join(line.strip() for line in lines[-2:])  # CUDA's errors have two lines
        raise UserError(f"{command[0]} failed with status {done.returncode}: {message}")
    if "Fell back to cudaMallocManaged" in done.stdout:
        raise UserError("llm.c did not find enough GPU memory: a smaller --batch needs less")
    [built] = _PRECISION.findall(done.stdout) or ["?"]
    if built not in PRECISIONS[precision]:
        wanted = precision.upper()
        raise UserError(
            f"{command[0]} computes in {built}, and the other contenders in {wanted}: build it"
            f" with PRECISION={wanted}"
        )
    times = [float(ms) for ms in _STEP.findall(done.stdout)]
    if len(times) != 2 * steps:
        raise UserError(f"{command[0]} printed the times of {len(times)} of {2 * steps} steps")
    mib = sum(int(size) for size in _MEMORY.findall(done.stdout))
    return sum(times[steps:]) / steps, mib * 2**20 / 1e9
