"""Who may import whom, and that DVC knows every source file a stage runs."""

import ast
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
FOLIO = sorted(path.stem for path in (ROOT / "folio").glob("*.py"))
LIBRARY = [module for module in FOLIO if module != "__main__"]  # which is the command line
STAGES = sorted(path.stem for path in (ROOT / "stages").glob("[!_]*.py"))
# a library, and the only modules that may import it
ONLY_IN = {
    "mlflow": {
        "folio/folio.tracking/store.py",
        "folio/folio.tracking/registry.py",
        "folio/folio.tracking/pyfunc.py",
    },
    "tiktoken": {"folio/folio.tokens/tokenizer.py"},
    "pandas": {"folio/folio.corpus/statistics.py"},
    "matplotlib": {
        "folio/folio.corpus/statistics.py",
        "folio/folio.sweeps/parallel_coordinates.py",
        "folio/folio/plots.py",
    },
    "optuna": {"folio/folio.sweeps/report.py"},
    "transformers": set(),
    "gradio": set(),
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


def of_ours(file: Path) -> set[Path]:
    """The files of folio and stages that a file imports."""
    names = {tuple(name.split(".")[:2]) for name in imports(file)}
    return {
        path
        for name in names
        if len(name) == 2 and (path := ROOT.joinpath(*name).with_suffix(".py")).exists()
    }


def closure(file: Path) -> set[Path]:
    found, new = set(), {file}
    while new:
        found |= new
        new = set().union(*(of_ours(path) for path in new)) - found
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_exactly_the_sources_it_imports(stage):
    described = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][stage]
    deps = {dep for dep in described["deps"] if dep.endswith(".py")}
    files = closure(ROOT / f"stages/{stage}.py")
    assert deps == {path.relative_to(ROOT).as_posix() for path in files}


@pytest.mark.parametrize("module", LIBRARY)
def test_the_library_imports_no_stage(module):
    assert not {name for name in imports(ROOT / f"folio/{module}.py") if name.startswith("stages")}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_no_other_stage(stage):
    assert not {name for name in imports(ROOT / f"stages/{stage}.py") if name.startswith("stages")}


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_stays_where_it_belongs(library):
    users = {
        path.relative_to(ROOT).as_posix()
        for folder in ("folio", "stages")
        for path in (ROOT / folder).glob("*.py")
        if any(name.split(".")[0] == library for name in imports(path))
    }
    assert users == ONLY_IN[library]


def test_the_model_and_the_optimizers_know_only_torch():
    own = {path.name for path in closure(ROOT / "folio/folio.gpt/model.py")} - {"model.py"}
    assert own == {"compiler.py", "head.py", "softmax.py"}
    assert not of_ours(ROOT / "folio/folio.training/optimizers.py")


@pytest.mark.parametrize("module", ["compare", "promote", "sync", "runtime"])
def test_what_only_asks_mlflow_does_not_wait_for_pytorch(module):
    assert not [path for path in closure(ROOT / f"folio/{module}.py") if "torch" in imports(path)]


def test_runtime_is_in_no_stage_and_every_other_section_is_in_one():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    listed = [section for stage in stages.values() for section in stage["params"]]
    sections = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert sorted(listed) == sorted(set(sections) - {"runtime"})
