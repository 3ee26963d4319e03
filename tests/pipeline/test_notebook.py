"""The notebook, executed from the start in a copy of the project without any runs."""

import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from nbformat import NotebookNode

from folio.run import Record, Run
from folio.tracking.store import Store
from folio.tracking.writer import RunWriter
from notebooks import execute

MAX_BYTES = 200_000  # of the committed file


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(notebook: NotebookNode) -> str:
    """All outputs except images, as JSON."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    shown = [{k: v for k, v in o.get("data", {}).items() if k != "image/png"} for o in outputs]
    return json.dumps([shown, [o.get("text", "") for o in outputs]], sort_keys=True)


@pytest.fixture(scope="module")
def committed() -> NotebookNode:
    return nbformat.read(execute.FILE, as_version=4)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    for name in ("folio", "stages", "notebooks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "params.yaml", folder)
    return folder


@pytest.fixture(scope="module")
def client(project: Path):
    """A client whose kernel has executed all cells and is still running."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DVC_ROOT", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        notebook = nbformat.read(project / "notebooks/tour.ipynb", as_version=4)
        client = execute.client(notebook, project / "notebooks")
        with client.setup_kernel():
            for index, cell in enumerate(client.nb.cells):
                client.execute_cell(cell, index)
            yield client


def value(client: NotebookClient, expression: str):
    """Evaluate an expression in the notebook's kernel; return its value by way of JSON."""
    cell = nbformat.v4.new_code_cell(f"import json; print(json.dumps({expression}))")
    client.nb.cells.append(cell)
    client.execute_cell(cell, len(client.nb.cells) - 1)
    return json.loads(client.nb.cells.pop().outputs[0].text)


def test_committed_outputs_are_those_of_the_committed_cells(committed):
    hint = "run python -m notebooks.execute"
    assert [cell.execution_count for cell in code_cells(committed)] == [
        *range(1, len(code_cells(committed)) + 1)
    ], hint
    assert committed.metadata["folio"]["code_sha256"] == execute.code_sha256(committed), hint


def test_committed_outputs_are_small_and_contain_no_local_paths(committed):
    assert execute.FILE.stat().st_size < MAX_BYTES
    assert (
        sum("image/png" in o.get("data", {}) for c in code_cells(committed) for o in c.outputs) >= 5
    )
    assert not re.search(r"/(home|root|work|tmp|usr)\b|site-packages|[Ww]arning", texts(committed))


def test_cells_all_run_without_warnings(client):
    outputs = [output for cell in code_cells(client.nb) for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


def test_new_run_shows_the_committed_outputs_except_for_numbers(client, committed):
    def shown(notebook: NotebookNode) -> dict[str, str]:
        """The texts of each cell without numbers, which other processors may round differently."""
        by_id = {cell.id: nbformat.v4.new_notebook(cells=[cell]) for cell in code_cells(notebook)}
        del by_id["sample"]
        return {id: re.sub(r"[\d.,\s-]+", " ", texts(cell)) for id, cell in by_id.items()}

    assert shown(client.nb) == shown(committed)


def test_corpus_has_as_many_tokens_as_prepare_reports(client):
    assert value(client, "[len(train_ids), len(validation_ids)]") == [301_966, 36_059]


def test_attention_weights_are_0_for_later_tokens_and_add_up_to_1(client):
    assert value(client, "weights.triu(1).abs().max().item()") == 0
    assert value(client, "weights.sum(-1).sub(1).abs().max().item()") < 1e-5


def test_later_tokens_do_not_change_earlier_logits(client):
    before, after = value(client, "[change[:changed].max().item(), change[changed:].max().item()]")
    assert before < 1e-4 and after > 0.1


def test_small_training_run_beats_the_unigram_model(client):
    first, last, unigram = value(
        client, "[losses['validation'].iloc[0], losses['validation'].iloc[-1], unigram_loss]"
    )
    assert last < unigram < first
    assert first == pytest.approx(10.82, abs=0.1)


def test_memorised_text_has_a_low_training_loss_and_a_high_validation_loss(client):
    training, validation = value(client, "memorised.iloc[-1].tolist()")
    assert training < 0.3 and validation > 9


def test_middle_learning_rate_is_best_and_the_project_is_unchanged(client, project):
    assert value(client, "found['train.learning_rate'].tolist()")[0] == "0.02"
    assert {path.name for path in project.iterdir()} == {
        *("folio", "stages", "notebooks", "params.yaml")
    }


def test_last_cell_shows_the_runs_of_the_project(client, project, monkeypatch):
    own = next(cell for cell in client.nb.cells if cell.get("id") == "own")
    assert "There are no runs yet" in own.outputs[0].data["text/plain"]
    monkeypatch.setenv("DVC_ROOT", str(project))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    record = Record(id="1", name="mine", started=1, ended=2, params={"train.seed": "7"}, tags={})
    summary = {"best_val_loss": 4.25, "best_step": 3, "last_train_loss": 4.0}
    summary |= {"steps": 5, "parameters": 100}
    RunWriter(Store(None)).send(Run(record=record, summary=summary), "FINISHED")
    client.execute_cell(own, client.nb.cells.index(own))
    assert "4.25" in own.outputs[0].data["text/plain"]
