"""Who may import whom, and what the imports imply: which sources make a stage run again.

dvc.yaml and the training's key name the sources that can change a stage's outs. They are derived
here from the imports, so neither list can be wrong for long.
"""

import ast
import functools
from pathlib import Path

import pytest
import yaml

from folio.training.key import FINGERPRINTED

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "folio").rglob("*.py")) + sorted((ROOT / "stages").glob("*.py"))
LIBRARY = [path for path in SOURCES if path.is_relative_to(ROOT / "folio")]
STAGES = sorted(path.stem for path in (ROOT / "stages").glob("[!_]*.py"))

GROUND = ("errors", "strict_yaml", "params", "files", "inputs", "signals", "device", "run", "plots")
GROUND += (
    "distributed",
    "gpus",
    "launch",
    "__init__",
    "commands",
    "user",
    "runtime",
    "output",
    "loopback",
    "progress",
)
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
# What can change no weight and no metric, except by rounding on another device: how an error is
# worded, how a signal is handled, whether a stage fails at its end, what MLflow is sent, where a
# stage runs. Some of it does reach the outs of train, but describes the run and is no reason to
# train again: the tags of tracking/context.py are in record.json, and history.jsonl has the
# readings of tracking/system_metrics.py and a row every runtime.log_interval steps.
HARMLESS = {"stages/__init__.py", "folio/__init__.py", "folio/errors.py", "folio/inputs.py"}
HARMLESS |= {"folio/signals.py", "folio/runtime.py", "folio/commands.py", "folio/user.py"}
HARMLESS |= {
    "folio/gpus.py",
    "folio/launch.py",
    "folio/output.py",
    "folio/loopback.py",
    "folio/progress.py",
    "folio/tracking",
}
# A library, and the only rooms or modules that may import it.
ONLY_IN = {
    "mlflow": {"folio/tracking"},
    "tiktoken": {"folio/tokens"},
    "pandas": {"folio/corpus"},
    "matplotlib": {"folio/corpus", "folio/plots.py", "folio/sweeps"},
    "optuna": {"folio/sweeps"},
    "typer": {"folio/cli"},
    "huggingface_hub": {"folio/cli"},
    "gradio": {"folio/app"},
    "transformers": set(),
    "dvc": set(),
}


@functools.cache
def statements(source: str) -> list[ast.Import | ast.ImportFrom]:
    """The imports in a source."""
    nodes = ast.walk(ast.parse(source))
    return [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]


def imports(file: Path, root: Path = ROOT) -> set[str]:
    """The modules a file imports, as dotted names; `from folio import x` gives folio and folio.x.

    Includes imports inside functions, and relative ones by their full name.
    """
    package = file.relative_to(root).parent.parts
    found = set()
    for node in statements(file.read_text()):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def libraries(file: Path) -> set[str]:
    """The top-level packages that a file imports."""
    return {name.partition(".")[0] for name in imports(file)}


def own_imports(file: Path, root: Path = ROOT) -> set[Path]:
    """The files of folio and stages that a file names in its imports: modules, and packages."""
    names = [name for name in imports(file, root) if name.startswith(("folio", "stages"))]
    paths = [root.joinpath(*name.split(".")) for name in names]
    return {
        source
        for path in paths
        for source in (path.with_suffix(".py"), path / "__init__.py")
        if source.is_file()
    }


def executed(file: Path, root: Path = ROOT) -> set[Path]:
    """The files that importing a file executes next: those that it imports and, before them and
    before the file itself, the __init__.py of each package on the way to them."""
    sources = own_imports(file, root)
    folders = {folder for path in {file, *sources} for folder in path.relative_to(root).parents}
    packages = {root / folder / "__init__.py" for folder in folders - {Path()}}
    return sources | {package for package in packages if package.is_file()}


def closure(file: Path, root: Path = ROOT, following=executed) -> set[Path]:
    """The file and all that it imports, directly or not."""
    found, new = set(), {file}
    while new:
        found |= new
        new = set().union(*(following(path, root) for path in new)) - found
    return found


def executed_unless_harmless(file: Path, root: Path = ROOT) -> set[Path]:
    """The same, but nothing for a harmless file, which cannot pass on what its imports change."""
    return set() if room(file, root) in HARMLESS else executed(file, root)


def room(path: Path, root: Path = ROOT) -> str:
    """folio/gpt for a file in a room, or the file itself on the ground floor or in stages."""
    parts = path.relative_to(root).parts
    return "/".join(parts[:2])


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def stages() -> dict:
    return yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def source_deps(stage: str) -> list[str]:
    return [dep for dep in stages()[stage]["deps"] if dep.startswith(("folio", "stages"))]


# Made-up sources, and what one of them executes, directly or not.
TREE = {
    "folio/__init__.py": "from folio import ground",
    "folio/ground.py": "import os",
    "folio/alone.py": "",
    "folio/low/__init__.py": "from . import settings",
    "folio/low/settings.py": "",
    "folio/low/a.py": "",
    "folio/low/deep/__init__.py": "",
    "folio/low/deep/b.py": "from ...alone import x",
    "folio/high/__init__.py": "",
    "folio/high/c.py": "",
    "stages/__init__.py": "",
    "stages/run.py": "IMPORT",
    "torch.py": "",
}
OF_FOLIO = ["folio/__init__.py", "folio/ground.py"]
LOW = ["folio/low/__init__.py", "folio/low/settings.py"]
DEEP = ["folio/alone.py", "folio/low/deep/__init__.py", "folio/low/deep/b.py"]


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("stages/run.py", "import torch", []),
        ("stages/run.py", "from folio.alone import x", [*OF_FOLIO, "folio/alone.py"]),
        ("stages/run.py", "from folio import low", OF_FOLIO + LOW),
        ("stages/run.py", "import folio.low as low", OF_FOLIO + LOW),
        ("stages/run.py", "from folio.low import a", [*OF_FOLIO, *LOW, "folio/low/a.py"]),
        ("stages/run.py", "from folio.low import a as b", [*OF_FOLIO, *LOW, "folio/low/a.py"]),
        ("stages/run.py", "from folio.low.deep.b import x", OF_FOLIO + LOW + DEEP),
        ("stages/run.py", "def f():\n    import folio.low", OF_FOLIO + LOW),
        ("folio/high/c.py", "from ..low import a", [*OF_FOLIO, *LOW, "folio/low/a.py"]),
        ("folio/high/c.py", "from .. import low", OF_FOLIO + LOW),
        ("folio/high/c.py", "from ..low.deep import b", OF_FOLIO + LOW + DEEP),
        ("folio/high/__init__.py", "from . import c", [*OF_FOLIO, "folio/high/c.py"]),
        ("folio/low/a.py", "from .deep.b import x", OF_FOLIO + LOW + DEEP),
    ],
)
def test_closure_has_every_file_that_an_import_executes(tmp_path, file, line, expected):
    for name, content in (TREE | {file: line}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    found = {path.relative_to(tmp_path) for path in closure(tmp_path / file, tmp_path)}
    own = {Path(file), Path(file).parent / "__init__.py"}  # importing a file executes its package
    assert found == {*map(Path, expected), *own}


@pytest.mark.parametrize(
    ("line", "rooms"),
    [
        ("from folio import low", {"folio/__init__.py", "folio/low"}),
        ("import folio.low", {"folio/low"}),
        ("from .. import low", {"folio/__init__.py", "folio/low"}),
        ("from ..low import a", {"folio/low"}),
        ("from . import c", {"folio/high"}),
        ("from ..alone import x", {"folio/alone.py"}),
        ("import folio", {"folio/__init__.py"}),
    ],
)
def test_import_of_a_room_is_found_however_it_is_written(tmp_path, line, rooms):
    for name, content in (TREE | {"folio/high/c.py": line}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    imported = own_imports(tmp_path / "folio/high/c.py", tmp_path)
    assert {room(path, tmp_path) for path in imported} == rooms


@pytest.mark.parametrize("stage", STAGES)
def test_stage_depends_on_the_sources_that_can_change_its_outs(stage):
    part = name_of if stage == "check" else room  # check uses a module of a room, not the room
    sources = closure(ROOT / f"stages/{stage}.py", following=executed_unless_harmless)
    imported = {part(path) for path in sources if path.read_text()}  # most __init__.py are empty
    assert source_deps(stage) == sorted(imported - HARMLESS)


def test_train_key_hashes_the_sources_that_train_depends_on():
    assert list(FINGERPRINTED) == source_deps("train")


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_module_imports_only_rooms_below_its_own(path):
    imported = {room(other) for other in own_imports(path)}
    parts = path.relative_to(ROOT).parts
    if parts[-1] == "sections.py":  # all params, and the inputs they name, above their rooms
        names = {"__init__.py", "params.py", "runtime.py", "errors.py", "corpus.py", "init_from.py"}
        assert {other.name for other in own_imports(path)} <= names
        allowed = imported
    elif parts[0] == "stages":
        allowed = {room(other) for other in LIBRARY} | {"stages/__init__.py"}
        allowed -= {"folio/cli", "folio/sweeps", "folio/app"}
    elif len(parts) == 2:  # the ground floor; the package and its command line
        allowed = {f"folio/{name}.py" for name in GROUND}
        allowed |= {"folio/cli"} if path.name == "__main__.py" else set()
    else:
        rooms = {parts[1]} | ARROWS[parts[1]]
        allowed = {f"folio/{name}.py" for name in GROUND} | {f"folio/{name}" for name in rooms}
        allowed |= {"folio/sections.py"} if parts[1] in ("sweeps", "cli") else set()
    assert imported <= allowed


def test_ground_floor_imports_follow_no_circle():
    paths = [ROOT / f"folio/{name}.py" for name in GROUND]
    for path in paths:
        for other in closure(path, following=own_imports) - {path}:
            circle = closure(other, following=own_imports)
            assert path not in circle, f"{path.name} and {other.name}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_library_is_imported_only_where_it_belongs(library):
    users = {room(path) for path in SOURCES if library in libraries(path)}
    assert users <= ONLY_IN[library]
    assert users or not ONLY_IN[library]


def test_model_imports_only_its_own_room_and_the_device():
    own = {name_of(path) for path in closure(ROOT / "folio/gpt/model.py")}
    ground = {"folio/device.py", "folio/errors.py", "folio/output.py", "folio/signals.py"}
    ground |= {"folio/__init__.py", "folio/user.py"}
    assert {name for name in own if not name.startswith("folio/gpt/")} <= ground


@pytest.mark.parametrize("module", ["cli/compare", "cli/promote", "tracking/sync", "sections"])
def test_module_does_not_import_pytorch(module):
    assert not [path for path in closure(ROOT / f"folio/{module}.py") if "torch" in libraries(path)]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_module_has_at_most_300_lines(path):
    assert len(path.read_text().splitlines()) <= 300


def test_train_stage_has_at_most_200_lines():
    assert len((ROOT / "stages/train.py").read_text().splitlines()) <= 200


def test_params_sections_are_each_in_one_stage_except_runtime_and_in_checks():
    described = stages()
    described.pop("check_pretrained")
    sections = yaml.safe_load((ROOT / "params.yaml").read_text())
    sections.pop("runtime")
    assert described.pop("check")["params"] == list(sections)
    listed = [section for stage in described.values() for section in stage["params"]]
    assert sorted(listed) == sorted(sections)


def test_every_stage_runs_after_the_check_of_params():
    described = stages()
    [out] = described.pop("check")["outs"]
    assert all(out in stage["deps"] for stage in described.values())
