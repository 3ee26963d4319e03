"""Whether a killed and resumed training gives the weights of the undisturbed one.

    python -m benchmarks.resume --steps 60 --precision bf16

Trains params.yaml (or a variant of it) twice in folders of its own, the second time killed with
SIGKILL after its first checkpoint and started again. Needs data/prepared (`dvc repro prepare`).
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from safetensors.torch import load_file

from folio import params, variants


def project(folder: Path, settings: dict) -> Path:
    """A folder with the prepared data and params.yaml with the settings laid over it."""
    shutil.copytree("data", folder / "data")
    tree = yaml.safe_load(params.FILE.read_text())
    for name, value in settings.items():
        section, key = name.split(".")
        tree[section][key] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(tree))
    return folder


def start(folder: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
    environment.pop("DVC_ROOT", None)
    return subprocess.Popen([sys.executable, "-m", "stages.train"], cwd=folder, env=environment)


def kill_after_checkpoint(folder: Path) -> None:
    training = start(folder)
    while not list(folder.glob(".checkpoints/*/step-*[0-9]")):
        if training.poll() is not None:
            sys.exit("training ended before its first checkpoint")
        time.sleep(0.02)
    training.send_signal(signal.SIGKILL)
    training.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", help="one of the files in variants/, without .yaml")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args()
    settings = variants.read(options.variant) if options.variant else {}
    settings |= {"train.steps": options.steps, "train.precision": options.precision}
    settings |= {"train.eval_interval": max(1, options.steps // 4), "train.patience": None}
    with tempfile.TemporaryDirectory() as temporary:
        whole = project(Path(temporary, "whole"), settings)
        killed = project(Path(temporary, "killed"), settings)
        if start(whole).wait():
            sys.exit("training failed")
        kill_after_checkpoint(killed)
        if start(killed).wait():
            sys.exit("training failed after the kill")
        files = [folder / "models/gpt2/model.safetensors" for folder in (whole, killed)]
        same = len({hashlib.sha256(file.read_bytes()).digest() for file in files}) == 1
        one, other = map(load_file, files)
        furthest = max(float((one[name] - other[name]).abs().max()) for name in one)
        losses = [
            json.loads((folder / "models/training/metrics.json").read_text())["best_val_loss"]
            for folder in (whole, killed)
        ]
    print(f"weights {'the same, bit for bit' if same else f'differ by at most {furthest:.2e}'}")
    print(f"best held-out loss {losses[0]:.6f} undisturbed, {losses[1]:.6f} killed and resumed")


if __name__ == "__main__":
    main()
