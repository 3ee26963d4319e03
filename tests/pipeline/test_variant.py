"""A variant through `dvc exp run`: every value arrives as it is in the variant's file."""

import json
import shutil

import pytest
import yaml
from conftest import commit, run, succeed
from dvc.utils.serialize import parse_yaml

PROMPTS = ["ROMEO:\n", "Grüß dich", r"a\n", "${train.seed}", "no", "1:40", '"a", b=\\']
SETTINGS = {
    "prepare": {"corpus": "data/raw/münchen.txt"},
    "train": {"steps": 2, "learning_rate": 1e-5, "patience": None},
    "evaluate": {"prompts": PROMPTS, "temperatures": [0.0]},
}


@pytest.fixture(scope="module")
def project(make_project):
    folder = make_project()
    shutil.copy(folder / "data/raw/verses.txt", folder / "data/raw/münchen.txt")
    (folder / "variants").mkdir()
    (folder / "variants/mine.yaml").write_text(yaml.safe_dump(SETTINGS, allow_unicode=True))
    commit(folder)
    return folder


def test_variant_trains_with_the_values_in_its_file(project):
    succeed(project, "python", "-m", "folio", "variant", "mine")
    record = json.loads((project / "models/evaluation/record.json").read_text())
    assert record["params"]["evaluate.prompts"] == str(PROMPTS)
    assert "    ROMEO:\n" in (project / "models/evaluation/samples.md").read_text()
    assert json.loads((project / "data/prepared/meta.json").read_text())["corpus"] == (
        "data/raw/münchen.txt"
    )
    in_dvc = parse_yaml((project / "params.yaml").read_text(), "params.yaml")
    locked = parse_yaml((project / "dvc.lock").read_text(), "dvc.lock")["stages"]
    for section, values in SETTINGS.items():
        stage = locked[section]["params"]["params.yaml"][section]
        assert values.items() <= in_dvc[section].items() and values.items() <= stage.items()


def test_variant_on_top_of_another_one_names_what_it_starts_from(project):
    succeed(project, "git", "checkout", "HEAD", "--", ".")
    (project / "variants/other.yaml").write_text("train: {seed: 5, steps: 2}\n")
    command = ("python", "-m", "folio", "variant", "other", "--queue")
    assert "is applied to" not in run(project, *command).stderr
    tree = yaml.safe_load((project / "params.yaml").read_text())
    tree["train"] |= {"seed": 9, "learning_rate": 0.5}
    (project / "params.yaml").write_text(yaml.safe_dump(tree))
    done = run(project, *command)
    [line] = [line for line in done.stderr.splitlines() if line.startswith("other is applied to")]
    assert "differs from the commit in train.learning_rate (" in line
    sweep = ("sweep", "train.steps=2,3", "--variant", "other", "--dry-run")
    assert line in run(project, "python", "-m", "folio", *sweep).stderr.splitlines()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{learning_rat: 1.0}", "train.learning_rat: unknown; did you mean train.learning_rate?"),
        ("{seed: 0010}", "train.seed: 0010 is 10 in YAML 1.2, which DVC reads, and 8 in YAML 1.1"),
        ('{init_from: "a\\0"}', "train.init_from: the character '\\x00' cannot be passed to DVC"),
        ("{steps: many}", "train.steps: 'many' is not valid; expected an int >= 1"),
    ],
)
def test_invalid_variant_is_rejected_before_dvc_starts(project, settings, message):
    before = (project / "params.yaml").read_bytes()
    (project / "variants/bad.yaml").write_text(f"train: {settings}\n")
    done = run(project, "python", "-m", "folio", "variant", "bad")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert (project / "params.yaml").read_bytes() == before
