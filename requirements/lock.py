"""Write requirements/*.txt: the versions of all packages, with the hashes of their files.

`make lock` runs this. It keeps the present versions as far as pyproject.toml allows them;
`make lock UPGRADE=1` takes the newest ones. uv resolves all packages together, for Python 3.11 and
newer, so that the files never contradict each other.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

FOLDER = Path(__file__).parent
PROJECT = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
BASE = PROJECT["dependencies"] + EXTRAS["transformers"]

HEADERS = {
    "torch": "PyTorch has no hash here: its builds with and without CUDA have the same version.",
    "base": "What `make run` installs.",
    "app": "The page (`make app`), in addition to base.txt.",
    "notebook": "JupyterLab (`make notebook`), in addition to base.txt.",
    "sweep": "The reports of sweeps (`make sweep`), in addition to base.txt.",
    "team": "A team's DVC remote in an S3 store (`make team`), in addition to base.txt.",
    "server": "A team's MLflow server (docs/team.md), without the rest of Folio.",
    "test": "The tests (`make test`), in addition to base.txt.",
    "lock": "uv, which `make lock` runs, in addition to base.txt.",
}
HOW = "# Written by `make lock`. It lists all dependencies: pip installs it with --no-deps.\n"


def main() -> None:
    upgrade = sys.argv[1:] == ["--upgrade"]
    with tempfile.TemporaryDirectory() as folder:
        everything = Path(folder) / "everything.txt"
        everything.write_text("".join(map(_text, FOLDER.glob("*.txt"))))
        _resolve(
            BASE + [each for extra in EXTRAS.values() for each in extra],
            *("--output-file", str(everything), *(["--upgrade"] if upgrade else [])),
        )
        torch = re.findall(r"^torch==[^ ]*", everything.read_text(), re.MULTILINE)[0]
        files = {"torch": {"torch": f"{torch}\n"}}
        files["base"] = _resolve(BASE, "--constraints", str(everything))
        server = [each for each in BASE if each.startswith("mlflow")] + EXTRAS["server"]
        files["server"] = _resolve(server, "--constraints", str(everything))
        for name in HEADERS.keys() - files.keys():
            found = _resolve(BASE + EXTRAS[name], "--constraints", str(everything))
            files[name] = {key: found[key] for key in found.keys() - files["base"].keys()}
    for name, blocks in files.items():
        lines = [blocks[key] for key in sorted(blocks) if key != "torch" or name == "torch"]
        (FOLDER / f"{name}.txt").write_text(f"# {HEADERS[name]}\n" + HOW + "".join(lines))


def _text(path: Path) -> str:
    return path.read_text() if path.stem in HEADERS else ""


def _resolve(requirements: list[str], *options: str) -> dict[str, str]:
    """The lines of each package that the requirements need, by its name."""
    command = ["uv", "pip", "compile", "-", "--config-file", str(FOLDER / "uv.toml"), "--quiet"]
    command += ["--universal", "--python-version", "3.11", "--fork-strategy", "fewest"]
    command += ["--generate-hashes", "--no-annotate", "--no-header", *options]
    done = subprocess.run(
        command, input="\n".join(requirements), stdout=subprocess.PIPE, text=True, check=True
    )
    lines: dict[str, str] = {}
    for block in re.findall(r"^[a-z].*\n(?: .*\n)*", done.stdout, re.MULTILINE):
        name = re.split("[=[ ]", block)[0]
        lines[name] = lines.get(name, "") + block  # two versions, for different versions of Python
    return lines


if __name__ == "__main__":
    main()
