"""Who may import whom, and what the imports imply: which sources make a stage run again.

dvc.yaml and the training's key name the sources that can change a stage's outs. They are derived
here from the imports, so neither list can be wrong for long.
"""

import ast
from pathlib import Path

import pytest
import yaml

from folio.training.key import FINGERPRINTED

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "folio").rglob("*.py")) + sorted((ROOT / "stages").glob("*.py"))
LIBRARY = [path for path in SOURCES if path.is_relative_to(ROOT / "folio")]
STAGES = sorted(path.stem for path in (ROOT / "stages").glob("[!_]*.py"))

GROUND = ("errors", "params", "files", "signals", "device", "run", "plots", "runtime")
# What each room may import, besides itself and the ground floor.
ARROWS = {
    "corpus": {"tokens"},
    "tokens": set(),
    "gpt": {"tokens"},
    "inference": {"tokens", "gpt"},
    "training": {"tokens", "gpt"},
    "tracking": {"tokens", "gpt", "inference"},
    "sweeps": {"tokens", "gpt", "inference", "training", "corpus", "tracking"},
    "cli": {"tokens", "gpt", "inference", "training", "corpus", "tracking", "sweeps"},
    "app": {"tokens", "gpt", "inference", "tracking"},
}
# What can change nothing that a stage writes: how an error is worded, how a signal is handled, what
# MLflow is sent, where a stage runs and how often it logs.
HARMLESS = {"folio/errors.py", "folio/signals.py", "folio/runtime.py", "folio/tracking"}
# A library, and the only rooms or modules that may import it.
ONLY_IN = {
    "mlflow": {"folio/tracking"},
    "tiktoken": {"folio/tokens"},
    "pandas": {"folio/corpus"},
    "matplotlib": {"folio/corpus", "folio/plots.py", "folio/sweeps"},
    "optuna": {"folio/sweeps"},
    "typer": {"folio/cli"},
    "gradio": {"folio/app"},
    "transformers": set(),
    "dvc": set(),
}


def imports(file: Path) -> set[str]:
    """The modules a file imports, as dotted names; `from folio import x` gives folio.x."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(file: Path) -> set[Path]:
    """The files of folio and stages that a file imports."""
    paths = {ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in imports(file)}
    return {path for path in paths if path.is_file() and path in SOURCES}


def closure(file: Path) -> set[Path]:
    """The file and all that it imports, directly or not."""
    found, new = set(), {file}
    while new:
        found |= new
        new = set().union(*(own_imports(path) for path in new)) - found
    return found


def room(path: Path) -> str:
    """folio/gpt for a file in a room, or the file itself on the ground floor or in stages."""
    parts = path.relative_to(ROOT).parts
    return "/".join(parts[:2])


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def stages() -> dict:
    return yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def source_deps(stage: str) -> list[str]:
    return [dep for dep in stages()[stage]["deps"] if dep.startswith(("folio", "stages"))]


@pytest.mark.parametrize("stage", STAGES)
def test_stage_depends_on_the_sources_that_can_change_its_outs(stage):
    imported = {room(path) for path in closure(ROOT / f"stages/{stage}.py")}
    assert source_deps(stage) == sorted(imported - HARMLESS)


def test_train_key_hashes_the_sources_that_train_depends_on():
    assert list(FINGERPRINTED) == source_deps("train")


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_module_imports_only_rooms_below_its_own(path):
    imported = {room(other) for other in own_imports(path)}
    parts = path.relative_to(ROOT).parts
    if parts[0] == "stages":
        allowed = {room(other) for other in LIBRARY} | {"stages/__init__.py"}
        allowed -= {"folio/cli", "folio/sweeps", "folio/app"}
    elif len(parts) == 2:  # the ground floor; the package and its command line
        allowed = {f"folio/{name}.py" for name in GROUND}
        allowed |= {"folio/cli"} if path.name == "__main__.py" else set()
    else:
        rooms = {parts[1]} | ARROWS[parts[1]]
        allowed = {f"folio/{name}.py" for name in GROUND} | {f"folio/{name}" for name in rooms}
    assert imported <= allowed


def test_ground_floor_imports_follow_no_circle():
    paths = [ROOT / f"folio/{name}.py" for name in GROUND]
    for path in paths:
        for other in closure(path) - {path}:
            assert path not in closure(other), f"{path.name} and {other.name}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_library_is_imported_only_where_it_belongs(library):
    users = {room(path) for path in SOURCES if library in {n.split(".")[0] for n in imports(path)}}
    assert users <= ONLY_IN[library]
    assert users or not ONLY_IN[library]


def test_model_imports_only_its_own_room_and_the_device():
    own = {name_of(path) for path in closure(ROOT / "folio/gpt/model.py")}
    ground = {"folio/device.py", "folio/errors.py", "folio/signals.py"}
    assert {name for name in own if not name.startswith("folio/gpt/")} <= ground


@pytest.mark.parametrize("module", ["cli/compare", "cli/promote", "tracking/sync", "runtime"])
def test_reading_from_mlflow_does_not_import_pytorch(module):
    assert not [path for path in closure(ROOT / f"folio/{module}.py") if "torch" in imports(path)]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_module_has_at_most_300_lines(path):
    assert len(path.read_text().splitlines()) <= 300


def test_train_stage_has_at_most_200_lines():
    assert len((ROOT / "stages/train.py").read_text().splitlines()) <= 200


def test_params_sections_are_each_in_one_stage_except_runtime():
    listed = [section for stage in stages().values() for section in stage["params"]]
    sections = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert sorted(listed) == sorted(set(sections) - {"runtime"})
