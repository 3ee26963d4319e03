"""Fingerprints of three short training runs, which a refactoring must not change by a single bit.

    python -m benchmarks.fingerprint tiny laptop
    python -m benchmarks.fingerprint seed-30m        # on a GPU, in bf16

Prints the checksum of the weights, and that of the history without values that depend on the clock.
Fingerprints are only comparable on the same machine with the same version of PyTorch.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from folio.errors import one_line_errors
from folio.gpt import weight_files

ROOT = Path(__file__).parent.parent
COPIED = ("folio", "stages", "data/pretrained", "params.yaml", "dvc.yaml")
VERSES = "".join(
    f"The sea of night {n} holds a star,\nand the star holds a sea of salt.\n\n" for n in range(150)
)
CASES = {
    # a few seconds: dropout, accumulation, checkpoints and tied embedding rows
    "tiny": {
        "prepare": {"corpus": "data/raw/verses.txt"},
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "dropout": 0.1},
        "train": {
            "steps": 60,
            "batch_size": 4,
            "accumulation": 2,
            "warmup_steps": 5,
            "eval_interval": 20,
            "unseen_probability": 0.0,
            "optimizer": "adamw",
            "factored_embedding": False,
            "beta2": 0.95,
        },
        "runtime": {"log_interval": 5, "checkpoint_seconds": 0},
    },
    "laptop": {"train": {"steps": 300, "warmup_steps": 30, "eval_interval": 100}},
    "seed-30m": {"train": {"steps": 100, "warmup_steps": 10, "eval_interval": 50}},
}
PRECISION = {"tiny": "fp32", "laptop": "fp32", "seed-30m": "bf16"}


def write_project(folder: Path, case: str) -> None:
    """Copy the code, and params.yaml with the case's variant and settings applied to it."""
    for name in COPIED:
        source, copy = ROOT / name, folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    (folder / "data/raw").mkdir(parents=True, exist_ok=True)
    (folder / "data/raw/verses.txt").write_text(VERSES)
    tree = yaml.safe_load((ROOT / "params.yaml").read_text())
    variant = ROOT / f"variants/{case}.yaml"
    for overlay in ([yaml.safe_load(variant.read_text())] if variant.exists() else []) + [
        CASES[case],
        {"train": {"precision": PRECISION[case]}, "runtime": {"system_metrics": False}},
    ]:
        for section, values in overlay.items():
            tree[section] |= values
    (folder / "params.yaml").write_text(yaml.safe_dump(tree))


def fingerprint(folder: Path) -> dict[str, str]:
    """Checksums of the weights, and of the history with sorted keys and without times."""
    rows = []
    for line in (folder / "models/training/history.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.append({k: v for k, v in row.items() if k not in ("time", "tokens_per_second")})
    history = "\n".join(json.dumps(row, sort_keys=True) for row in rows)
    return {
        "weights": weight_files.sha256(folder / "models/gpt2"),
        "history": hashlib.sha256(history.encode()).hexdigest(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="+", choices=CASES)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_"))}
    for case in parser.parse_args().cases:
        with tempfile.TemporaryDirectory(prefix="folio-") as folder:
            write_project(Path(folder), case)
            for stage in ("prepare", "train"):
                command = [sys.executable, "-m", f"stages.{stage}"]
                subprocess.run(
                    command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL
                )
            for what, value in fingerprint(Path(folder)).items():
                print(f"{case:<8} {what:<7} {value}", flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main()
