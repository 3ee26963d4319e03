"""What SECURITY.md promises: no pickle, no shell, no open port, no known vulnerabilities."""

import ast
import pickle
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from mlflow.server.security_utils import is_allowed_host_header
from packaging.requirements import Requirement

from folio import strict_yaml
from folio.cli import ui
from folio.errors import UserError
from folio.gpt import huggingface
from folio.gpt.model import GPT, ModelParams

FOLDERS = ("folio", "stages", "benchmarks", "notebooks")
SOURCES = sorted([*ROOT.glob("*.py"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.py"))])
# Modules that serialize Python objects, and calls that run code or a shell.
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.save"}
CALLS |= {"yaml.unsafe_load", "yaml.full_load"}
CALLS |= {"subprocess.getoutput", "subprocess.getstatusoutput"}


def dangers(source: str) -> list[str]:
    """The forbidden imports and calls of a Python source, each with its line number."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            names = {alias.name.split(".")[0] for alias in node.names} | {module.split(".")[0]}
            found += [f"{node.lineno}: import {name}" for name in names & MODULES]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
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
    """Whether a call of yaml.load has a loader of plain values only, as strict_yaml has."""
    loaders = [ast.unparse(each) for each in [*call.args[1:], *(k.value for k in call.keywords)]]
    fast = "getattr(yaml, 'CSafeLoader', yaml.SafeLoader)"
    return len(loaders) == 1 and loaders[0] in ("_Loader", "yaml.SafeLoader", fast)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_source_neither_unpickles_nor_runs_what_it_reads(path):
    assert dangers(path.read_text()) == []


def test_loader_of_params_is_safe():
    assert issubclass(strict_yaml._Loader, yaml.SafeLoader)


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
def test_search_finds_dangerous_code(source):
    assert dangers(source)


# --- a malicious model folder


class Exploit:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_load_runs_no_code_of_a_model_folder_and_writes_nothing(tmp_path):
    folder = tmp_path / "model"
    sizes = ModelParams(n_layer=1, n_head=1, n_embd=4, block_size=4, dropout=0.0)
    huggingface.save(GPT(sizes, 7), folder)
    payload = pickle.dumps(Exploit(tmp_path / "exploited"))
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt"):
        (folder / name).write_bytes(payload)
    module = f"import pathlib; pathlib.Path({str(tmp_path / 'exploited')!r}).touch()"
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
    (folder / "model.safetensors").write_bytes(payload)  # a pickle under another name
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        huggingface.load(folder)
    assert not (tmp_path / "exploited").exists()


# --- servers and versions


@pytest.mark.parametrize(
    ("host", "allowed"),
    [("localhost:5000", True), ("127.0.0.1:5000", True), ("[::1]:5000", True), ("localhost", True)]
    + [("folio.localhost:5000", True), ("folio.localhost.evil.example:5000", False)]
    + [("evil.example", False), ("10.evil.example", False), ("192.168.evil.example:80", False)]
    + [("127.0.0.1.evil.example", False), ("localhost.evil.example:5000", False), ("", False)],
)
def test_mlflow_answers_only_to_the_names_of_this_machine(host, allowed):
    assert is_allowed_host_header([*ui.ALLOWED], host) == allowed


# The first versions without known vulnerabilities. In earlier ones, torch.load ran code despite
# weights_only, MLflow's server let anyone read and write files, and transformers downloaded and ran
# code that a model's config.json named (CVE-2026-4372).
FIRST = {"torch": "2.10", "mlflow": "3.17.2", "transformers": "5.3"}


@pytest.mark.parametrize(("name", "first"), FIRST.items())
def test_versions_with_known_vulnerabilities_are_excluded(name, first):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = [Requirement(each) for group in groups for each in group]
    found = [each for each in declared if each.name == name]
    *front, last = map(int, first.split("."))
    older = ".".join(map(str, [*front, last - 1]))
    for old in (older, f"{older}.99", f"{front[0] - 1}.99"):
        assert found and not any(each.specifier.contains(old) for each in found), old
