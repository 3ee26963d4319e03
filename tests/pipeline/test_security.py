"""What SECURITY.md promises: no pickle, no shell, no way out of the project, no open port."""

import ast
import pickle
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement

from folio import params
from folio.gpt import huggingface
from folio.errors import UserError
from folio.gpt.model import GPT, ModelParams
from folio.runtime import RuntimeParams

SOURCES = sorted(
    path
    for folder in (".", "folio", "stages", "benchmarks")
    for path in (ROOT / folder).glob("*.py")
)
# Modules that run or store Python objects, and calls that run code or a shell.
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.save"}
CALLS |= {
    "yaml.unsafe_load",
    "yaml.full_load",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
}


def dangers(source: str) -> list[str]:
    """What a Python source has of the things that it must not have, as line: what."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            names = {alias.name.split(".")[0] for alias in node.names} | {module.split(".")[0]}
            found += [f"{node.lineno}: import {name}" for name in names & MODULES]
        elif isinstance(node, ast.Call):
            name, given = (
                ast.unparse(node.func),
                {k.arg: ast.unparse(k.value) for k in node.keywords},
            )
            if (
                name in CALLS
                or (name == "torch.load" and given.get("weights_only") != "True")
                or (name == "yaml.load" and not _is_safe(node))
                or given.get("shell", "False") != "False"
                or given.get("allow_pickle", "False") != "False"
            ):
                found.append(f"{node.lineno}: {name}")
    return found


def _is_safe(call: ast.Call) -> bool:
    """Whether yaml.load is given a loader of plain values alone; params' own is one (see below)."""
    loaders = [ast.unparse(each) for each in [*call.args[1:], *(k.value for k in call.keywords)]]
    fast = "getattr(yaml, 'CSafeLoader', yaml.SafeLoader)"
    return len(loaders) == 1 and loaders[0] in ("_Loader", "yaml.SafeLoader", fast)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_pickles_or_runs_what_it_reads(path):
    assert dangers(path.read_text()) == []


def test_the_loader_of_params_is_a_safe_one():
    assert issubclass(params._Loader, yaml.SafeLoader)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "torch.load('x', weights_only=False)",
        "torch.save({}, 'x')",
        "np.load('x', allow_pickle=True)",
        "yaml.load(text, yaml.Loader)",
        "yaml.load(text, Loader=yaml.FullLoader)",
        "eval(text)",
        "exec(text)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
    ],
)
def test_the_search_finds_what_it_is_for(source):
    assert dangers(source)


# --- a model folder from a stranger


class Harm:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_model_folder_runs_no_code_and_writes_nothing(tmp_path):
    folder = tmp_path / "model"
    sizes = ModelParams(n_layer=1, n_head=1, n_embd=4, block_size=4, dropout=0.0)
    huggingface.save(GPT(sizes, 7), folder)
    harm = pickle.dumps(Harm(tmp_path / "harmed"))
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt"):
        (folder / name).write_bytes(harm)
    module = f"import pathlib; pathlib.Path({str(tmp_path / 'harmed')!r}).touch()"
    for name in ("modeling_gpt2.py", "configuration.py", "__init__.py"):
        (folder / name).write_text(module)
    config = (folder / "config.json").read_text().rstrip("}\n")
    auto_map = '"auto_map": {"AutoModelForCausalLM": "modeling_gpt2.Model"}'
    (folder / "config.json").write_text(f'{config}, {auto_map}, "trust_remote_code": true}}')

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = contents()
    huggingface.load(folder)
    assert contents() == before
    (folder / "model.safetensors").write_bytes(harm)  # a pickle by another name
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        huggingface.load(folder)
    assert not (tmp_path / "harmed").exists()


# --- paths in params.yaml


def runtime(tracking_uri: str | None) -> RuntimeParams:
    settings = yaml.safe_load((ROOT / "params.yaml").read_text())["runtime"]
    return RuntimeParams(**settings | {"tracking_uri": tracking_uri})


@pytest.mark.parametrize(
    "address",
    [
        "sqlite:///../x.db",
        "sqlite:///data/../../x.db",
        "sqlite:///%2e%2e/x.db",
        "sqlite:///file:../x.db?uri=true",
        "SQLite+pysqlite:///../x.db",
        "sqlite://../x.db",
        "../mlruns",
        "..",
        "mlruns/../../x",
        "..\\x",
        "://../x",
        "1://../x",
        "file:../x",
        "file://../x",
    ],
)
def test_a_relative_store_that_leads_out_of_the_project_is_refused(address):
    with pytest.raises(ValueError, match=r"^tracking_uri: .*give an absolute path") as problem:
        runtime(address)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize(
    "address",
    [
        None,
        "sqlite:///mine.db",
        "sqlite:///stores/mine..db",
        "sqlite:////tmp/mine.db",
        "sqlite:////tmp/../mine.db",
        "mlruns",
        "/tmp/mlruns",
        "file:///tmp/../mlruns",
        "http://127.0.0.1:5000",
        "https://example.org/a/../b",
        "postgresql://user@host/db",
        "databricks",
    ],
)
def test_a_store_in_the_project_or_at_an_absolute_address_is_taken(address):
    assert runtime(address).tracking_uri == address


# --- servers and versions


def test_every_server_that_make_starts_listens_on_this_machine_alone():
    recipes = re.findall(r"^\t[@-]*(.+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    servers = re.compile(
        r"^(?:python -m )?(?:mlflow (?:ui|server)|gradio|uvicorn|gunicorn|http\.server)"
    )
    started = [line for line in recipes if servers.match(line)]
    assert started
    for line in started:
        assert "--host 127.0.0.1" in line, line


# The first versions without what is known of those before: torch.load ran code in spite of
# weights_only, and MLflow's server let a stranger read and write files.
@pytest.mark.parametrize(("name", "first"), [("torch", "2.10"), ("mlflow", "3.11")])
def test_versions_with_known_vulnerabilities_are_left_out(name, first):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [allowed] = [each for each in map(Requirement, project["dependencies"]) if each.name == name]
    major, minor = map(int, first.split("."))
    for old in (f"{major - 1}.99", f"{major}.{minor - 1}.99"):
        assert not allowed.specifier.contains(old), old
    [pinned] = re.findall(
        rf"^{name}==(.+)$", (ROOT / "requirements/base.txt").read_text(), re.MULTILINE
    )
    assert allowed.specifier.contains(pinned)
