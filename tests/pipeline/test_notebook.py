"""The notebook, executed from its start in a copy of the project that has never run anything."""

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
from folio.tracking import store
from notebooks import execute

LONGEST = 200_000  # bytes of the committed file


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(notebook: NotebookNode) -> str:
    """All that the outputs hold but pictures."""
    outputs = [output for cell in code(notebook) for output in cell.outputs]
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
    """Its kernel is still there, with all cells executed."""
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
    """What an expression is in the notebook, as JSON has it."""
    cell = nbformat.v4.new_code_cell(f"import json; print(json.dumps({expression}))")
    client.nb.cells.append(cell)
    client.execute_cell(cell, len(client.nb.cells) - 1)
    return json.loads(client.nb.cells.pop().outputs[0].text)


def test_the_committed_outputs_are_those_of_the_committed_cells(committed):
    again = "run python -m notebooks.execute"
    assert [cell.execution_count for cell in code(committed)] == [
        *range(1, len(code(committed)) + 1)
    ], again
    assert committed.metadata["folio"]["code_sha256"] == execute.code_sum(committed), again


def test_the_committed_outputs_are_small_and_tell_nothing_of_the_machine(committed):
    assert execute.FILE.stat().st_size < LONGEST
    assert sum("image/png" in o.get("data", {}) for c in code(committed) for o in c.outputs) >= 5
    assert not re.search(r"/(home|root|work|tmp|usr)\b|site-packages|[Ww]arning", texts(committed))


def test_every_cell_runs_and_nothing_warns(client):
    outputs = [output for cell in code(client.nb) for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


def test_a_fresh_run_shows_what_the_committed_one_does_but_for_figures(client, committed):
    def shown(notebook: NotebookNode) -> dict[str, str]:
        """Each cell's texts less their figures, which another processor may round otherwise."""
        alone = {cell.id: nbformat.v4.new_notebook(cells=[cell]) for cell in code(notebook)}
        del alone["sample"]
        return {id: re.sub(r"[\d.,\s-]+", " ", texts(cell)) for id, cell in alone.items()}

    assert shown(client.nb) == shown(committed)


def test_the_corpus_in_it_is_the_one_that_prepare_reports(client):
    assert value(client, "[len(train_ids), len(held_out_ids)]") == [301_966, 36_059]


def test_no_token_attends_to_a_later_one_and_each_takes_a_whole(client):
    assert value(client, "shares.triu(1).abs().max().item()") == 0
    assert value(client, "shares.sum(-1).sub(1).abs().max().item()") < 1e-5


def test_later_tokens_change_no_logit_before_them(client):
    before, after = value(client, "[change[:changed].max().item(), change[changed:].max().item()]")
    assert before < 1e-4 and after > 0.1


def test_the_small_training_learns_more_than_to_count_tokens(client):
    first, last, counted = value(
        client, "[losses['held-out'].iloc[0], losses['held-out'].iloc[-1], counted]"
    )
    assert last < counted < first
    assert first == pytest.approx(10.82, abs=0.1)


def test_text_learned_by_heart_has_a_low_training_loss_and_a_high_held_out_loss(client):
    training, held_out = value(client, "by_heart.iloc[-1].tolist()")
    assert training < 0.3 and held_out > 9


def test_the_middle_learning_rate_wins_and_the_project_is_left_alone(client, project):
    assert value(client, "found['train.learning_rate'].tolist()")[0] == "0.02"
    assert {path.name for path in project.iterdir()} == {
        *("folio", "stages", "notebooks", "params.yaml")
    }


def test_the_last_cell_shows_the_runs_that_the_project_has(client, project, monkeypatch):
    own = next(cell for cell in client.nb.cells if cell.get("id") == "own")
    assert "No runs here yet" in own.outputs[0].data["text/plain"]
    monkeypatch.setenv("DVC_ROOT", str(project))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    record = Record(id="1", name="mine", started=1, ended=2, params={"train.seed": "7"}, tags={})
    figures = {"best_val_loss": 4.25, "best_step": 3, "last_train_loss": 4.0}
    figures |= {"steps": 5, "parameters": 100}
    store.Store(None).send(Run(record=record, figures=figures), "FINISHED")
    client.execute_cell(own, client.nb.cells.index(own))
    assert "4.25" in own.outputs[0].data["text/plain"]
