"""The shipped variants against the code."""

import pytest
import yaml
from conftest import ROOT, run

from folio import params
from folio.sweeps import variants
from folio.errors import UserError
from folio.gpt.model import ModelParams
from folio.runtime import RuntimeParams
from stages.evaluate import EvaluateParams
from stages.prepare import PrepareParams
from stages.train import TrainParams

NAMES = sorted(path.stem for path in (ROOT / "variants").glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_laid_over_params_is_a_whole_set_of_params(name, tmp_path):
    tree = yaml.safe_load((ROOT / "params.yaml").read_text())
    for section, values in yaml.safe_load((ROOT / f"variants/{name}.yaml").read_text()).items():
        assert values.keys() <= tree[section].keys()
        tree[section] |= values
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree))
    _, model, train, evaluate, _ = params.load(
        tmp_path / "params.yaml",
        prepare=PrepareParams,
        model=ModelParams,
        train=TrainParams,
        evaluate=EvaluateParams,
        runtime=RuntimeParams,
    )
    assert evaluate.stride <= model.block_size
    assert train.warmup_steps < train.steps


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no sections"),
        ("train: 5", "its top level takes prepare, model"),
        ("trian: {steps: 5}", "its top level takes prepare, model"),
        ("train: {steps: 5, steps: 6}", "line 1: steps is there twice"),
        ("train: [", "is not YAML"),
    ],
)
def test_a_variant_that_is_no_overlay_is_one_line(tmp_path, monkeypatch, text, words):
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.setattr(variants, "FOLDER", tmp_path)
    with pytest.raises(UserError) as problem:
        variants.read("mine")
    assert "mine.yaml" in str(problem.value) and words in str(problem.value)
    assert "\n" not in str(problem.value)


def test_an_unknown_variant_is_named_with_those_there_are():
    done = run(ROOT, "python", "-m", "folio", "variant", "gpt5")
    assert done.returncode == 1
    assert "'gpt5'" in done.stderr and "seed-30m" in done.stderr
