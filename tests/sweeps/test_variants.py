"""The named variants of this repository, and how invalid ones are reported."""

import pytest
import yaml
from conftest import ROOT, folio

from folio import params
from folio.errors import UserError
from folio.sections import SECTIONS
from folio.sweeps import variants

NAMES = sorted(path.stem for path in (ROOT / "variants").glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_variant_gives_a_complete_set_of_params(name, tmp_path):
    tree = yaml.safe_load((ROOT / "params.yaml").read_text())
    for section, values in yaml.safe_load((ROOT / f"variants/{name}.yaml").read_text()).items():
        assert values.keys() <= tree[section].keys()
        tree[section] |= values
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree))
    _, model, train, evaluate, _ = params.load(tmp_path / "params.yaml", **SECTIONS)
    assert evaluate.stride <= model.block_size
    assert train.warmup_steps < train.steps


@pytest.mark.parametrize("name", NAMES)
def test_read_flattens_a_variant(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    tree = yaml.safe_load((ROOT / f"variants/{name}.yaml").read_text())
    settings = variants.read(name)
    assert len(settings) == sum(map(len, tree.values()))
    assert settings["train.steps"] == tree["train"]["steps"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no sections"),
        ("train: 5", "only sections are allowed at the top level: prepare, model"),
        ("trian: {steps: 5}", "only sections are allowed at the top level: prepare, model"),
        ("train: {steps: 5, steps: 6}", "line 1: duplicate key steps"),
        ("train: [", "is not valid YAML"),
    ],
)
def test_read_reports_an_invalid_variant_on_one_line(tmp_path, monkeypatch, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.setattr(variants, "FOLDER", tmp_path)
    with pytest.raises(UserError) as error:
        variants.read("mine")
    assert "mine.yaml" in str(error.value) and message in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_variant_is_reported_with_the_available_ones():
    with pytest.raises(UserError, match=r"'gpt5'.*seed-30m"):
        folio(ROOT, "variant", "gpt5")
