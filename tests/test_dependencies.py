"""pyproject.toml against the imports and against the pinned versions in requirements/."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GROUPS = {"dependencies": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
# The extra that a room may import besides the dependencies.
EXTRAS = {"folio/app": "app", "folio/sweeps": "sweep"}
OURS = {"folio", "stages", "tests", "conftest", "benchmarks", "notebooks", "app"}
OURS |= {path.stem for path in (ROOT / "tests").rglob("*.py")}
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "PIL": "pillow",
    "markdown_it": "markdown-it-py",
}  # by module, where the names differ
COMES_WITH = {"triton": "torch", "tiktoken_ext": "tiktoken"}  # part of another distribution
COMMANDS = {"dvc"}  # used only through their command line


def declared(group: str) -> set[str]:
    return {canonicalize_name(Requirement(each).name) for each in GROUPS[group]}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def distributions(path: Path) -> set[str]:
    """The distributions that a file imports from, except the standard library and Folio's own."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module.split(".")[0])
    names = modules - OURS - sys.stdlib_module_names
    return {canonicalize_name(COMES_WITH.get(n, DISTRIBUTIONS.get(n, n))) for n in names}


def allowed(path: Path) -> set[str]:
    extra = EXTRAS.get(path.relative_to(ROOT).parent.as_posix())
    return declared("dependencies") | (declared(extra) if extra else set())


@pytest.mark.parametrize("folder", ["folio", "stages"])
def test_imports_of_the_library_are_declared(folder):
    undeclared = {
        path.relative_to(ROOT).as_posix(): names
        for path in sources(folder)
        if (names := distributions(path) - allowed(path))
    }
    assert not undeclared


def test_imports_of_tests_and_benchmarks_are_declared_in_some_extra():
    imported = set().union(*map(distributions, sources("tests", "benchmarks", "notebooks")))
    assert imported <= set().union(*map(declared, GROUPS))


def test_dependencies_are_imported_or_are_commands():
    imported = set().union(*map(distributions, sources("folio", "stages")))
    assert declared("dependencies") - imported == COMMANDS


@pytest.mark.parametrize("folder", EXTRAS)
def test_extra_of_a_room_is_imported_there(folder):
    imported = set().union(*map(distributions, sources(folder)))
    assert declared(EXTRAS[folder]) <= imported


@pytest.mark.parametrize("group", GROUPS)
def test_pinned_versions_satisfy_pyproject(group):
    pinned = {
        canonicalize_name(name): version
        for path in (ROOT / "requirements").glob("*.txt")
        for name, version in re.findall(r"^([\w.-]+)==([^\s\\]+)", path.read_text(), re.MULTILINE)
    }
    for requirement in map(Requirement, GROUPS[group]):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])


def pins(file: str) -> dict[str, str]:
    """The lines of each package that a file of requirements/ installs, by its name."""
    text = (ROOT / "requirements" / file).read_text()
    found: dict[str, str] = {}
    for lines in re.findall(r"^[\w.-]+==.*\n(?: .*\n)*", text, re.MULTILINE):
        name = canonicalize_name(lines.split("==")[0])
        found[name] = found.get(name, "") + lines
    return found


def test_dependencies_are_all_pinned_for_make_run():
    assert declared("dependencies") <= pins("base.txt").keys() | pins("torch.txt").keys()


@pytest.mark.parametrize("group", sorted(GROUPS.keys() - {"dependencies"}))
def test_extra_is_pinned_in_its_file_or_in_base(group):
    file = "base.txt" if group == "transformers" else f"{group}.txt"
    assert declared(group) <= pins("base.txt").keys() | pins(file).keys()


FILES = sorted((ROOT / "requirements").glob("*.txt"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_pins_have_hashes_and_agree_with_those_of_base(path):
    """PyTorch's versions without and with CUDA have different files."""
    base = pins("base.txt")
    for name, lines in pins(path.name).items():
        assert name == "torch" or "--hash=sha256:" in lines
        assert name not in base or base[name].split()[0] == lines.split()[0]


@pytest.mark.parametrize("folder", ["folio", "stages"])
def test_folders_of_sources_are_packages(folder):
    assert all((path.parent / "__init__.py").exists() for path in sources(folder))
