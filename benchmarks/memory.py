"""Peak memory and speed of a variant on a GPU, by precision and gradient checkpointing.

    python -m benchmarks.memory gpt2-124m --steps 50

Requires data/prepared (`dvc repro prepare`). The loss of the last step shows that training works.
"""

import argparse
import gc
import time
from statistics import median

import torch

from benchmarks.recipe import build
from folio.errors import UserError, one_line_errors
from folio.sweeps import variants
from folio.training.trainer import Trainer


def measure(trainer: Trainer, steps: int) -> tuple[float, float, float]:
    """The peak memory in GB, tokens/s in the median step, and the loss of the last step."""
    torch.cuda.reset_peak_memory_stats()
    seconds, metrics = [], {"train_loss": 0.0}
    for step in range(steps):
        started = time.perf_counter()
        trainer.step(trainer.batches(step), trainer.learning_rate(step))
        metrics = trainer.read()  # waits for the device
        trainer.log(metrics)
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 1e9
    return peak, trainer.tokens_per_step / median(seconds), metrics["train_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", help="one of the files in variants/, without .yaml")
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("this measures a GPU's memory, and PyTorch found no GPU on this machine")
    variant = variants.read(options.variant)
    print(f"{options.variant}, {options.steps} steps on {torch.cuda.get_device_name()}")
    print("precision  gradient checkpointing  peak GB  tokens/s  last loss")
    for precision in ("bf16", "fp16", "fp32"):
        for checkpointing in (False, True):
            settings = {"precision": precision, "gradient_checkpointing": checkpointing}
            trainer, _ = build(variant | {f"train.{key}": v for key, v in settings.items()})
            peak, speed, loss = measure(trainer, options.steps)
            on = "on" if checkpointing else "off"
            print(f"{precision:<9}  {on:<22}  {peak:7.1f}  {speed:8,.0f}  {loss:9.3f}", flush=True)
            del trainer
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    with one_line_errors():
        main()
