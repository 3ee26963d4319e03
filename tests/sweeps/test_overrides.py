"""Every value arrives in params.yaml through DVC unchanged, or is rejected with a line."""

from typing import Any

import pytest
import yaml
from conftest import ROOT
from dvc.utils.hydra import apply_overrides
from dvc.utils.serialize import parse_yaml

from folio import params
from folio.errors import UserError
from folio.sweeps import overrides

TREE = yaml.safe_load((ROOT / "params.yaml").read_text())


def through_dvc(folder, settings: dict[str, Any]) -> dict[str, Any]:
    """The content of params.yaml after DVC has overridden it with these settings."""
    path = folder / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text())
    apply_overrides(path, overrides.param_options(settings)[1::2])
    tree = params.read(path)
    assert tree == parse_yaml(path.read_text(encoding="utf-8"), path)
    return tree


@pytest.mark.parametrize(
    "text",
    ["ROMEO:\n", "Grüß dich", r"ROMEO:\n", r"Gr\u00fc\u00df", "🙂", "\r\n\t", " a ", "", "a\\"]
    + ['"', "'", r"\"", r"\\'", "a,b", "a=b", "[a]", "{a: b}", "a: b", "# a", "- a", "~", "?", "%"]
    + ["null", "true", "yes", "no", "1", "1e-5", "0042", "1:40", "2024-01-01", ".inf", "=", "<<"]
    + ["${train.seed}", r"\${train.seed}", r"\\${x}", "${", "$", "$${a}b${c}", "${oc.env:HOME}"]
    + ["choice(1,2)", "range(1,3)", "glob(*)", "a b", "(", "\x1b[31m", "\ufeff", "\\"],
)  # fmt: skip
def test_text_arrives_unchanged(tmp_path, text):
    settings = {"prepare.corpus": text, "evaluate.prompts": [text, "a", text]}
    tree = through_dvc(tmp_path, settings)
    assert tree["prepare"]["corpus"] == text
    assert tree["evaluate"]["prompts"] == [text, "a", text]
    assert tree["train"] == TREE["train"]


@pytest.mark.parametrize(
    "value", [5, -1, True, False, None, 1e-5, 1e16, -0.0, 2.5, [], [0.0, 1.5], [[1], ["a", None]]]
)
def test_value_arrives_unchanged(tmp_path, value):
    found = through_dvc(tmp_path, {"train.steps": value})["train"]["steps"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("a\0b", "the character '\\x00' cannot be passed to DVC"),
        ("a\x85b", "the character '\\x85' cannot be passed to DVC"),
        ("a\u2028b", "the character '\\u2028' cannot be passed to DVC"),
        ("\udcff", "the character '\\udcff' cannot be passed to DVC"),
        ("???", "the text ??? cannot be passed to DVC"),
        ({"a": 1}, "a dict cannot be passed to DVC"),
        ("x" * 200_000, "a value of 200,019 bytes is too long for --set-param"),
    ],
)
def test_value_that_dvc_would_change_is_rejected(value, problem):
    for each in (value, ["a", value]):
        with pytest.raises(UserError) as error:
            overrides.param_options({"evaluate.prompts": each})
        line = str(error.value)
        assert line.startswith("evaluate.prompts: ") and line.isprintable()
        assert problem.split(" bytes")[-1] in line
        assert line.endswith(": write the value to params.yaml, and run `dvc repro`")


def test_text_outside_the_encoding_of_the_locale_is_rejected(monkeypatch):
    monkeypatch.setattr(overrides.os, "fsencode", lambda text: text.encode("latin-1"))
    overrides.param_options({"prepare.corpus": "data/raw/münchen.txt"})
    with pytest.raises(UserError, match=r"'\\u4e2d' cannot be passed to DVC in this locale"):
        overrides.param_options({"prepare.corpus": "中.txt"})


@pytest.mark.parametrize("prompt", ["${train.seed}", "???", "a ${b"])
def test_param_that_dvc_would_replace_meanwhile_is_rejected(prompt):
    tree = TREE | {"evaluate": TREE["evaluate"] | {"prompts": ["a", prompt]}}
    with pytest.raises(UserError, match=r"params\.yaml: evaluate\.prompts: DVC would replace "):
        overrides.check(tree, {"train.seed": 1}, "here")
    overrides.check(tree, {"evaluate.prompts": ["a"]}, "here")


def test_invalid_result_is_rejected():
    with pytest.raises(
        UserError, match=r"^here: train\.seeds: unknown; did you mean train\.seed\?"
    ):
        overrides.check(TREE, {"train.seeds": 1}, "here")
    for name in ("train.distill_from", "train.init_from", "prepare.corpus"):
        with pytest.raises(UserError, match=f"here: {name}: 'data/raw/no.txt'"):
            settings = {name: "data/raw/no.txt", "train.tie_unseen_tokens": False}
            overrides.check(TREE, settings, "here")
    with pytest.raises(UserError, match=r"^here: evaluate\.stride 32 is longer than"):
        overrides.check(TREE, {"model.block_size": 16}, "here")
    with pytest.raises(UserError, match=r"^here: runtime\.processes: train\.parallel is none"):
        overrides.check(TREE, {"train.parallel": "none", "runtime.processes": 2}, "here")


@pytest.mark.parametrize(
    ("typed", "prompts"),
    [
        ('["Dear diary,\n", "Grüß dich"]', ["Dear diary,\n", "Grüß dich"]),
        (r'["Dear diary,\n"]', [r"Dear diary,\n"]),
        (r'["Gr\u00fc\u00df dich"]', [r"Gr\u00fc\u00df dich"]),
        (r'["a \"b\""]', ['a "b"']),
        (r'["\${train.seed}"]', ["${train.seed}"]),
        ('["${train.seed}"]', [1337]),
    ],
)
def test_value_typed_after_set_param_is_read_as_the_documentation_says(tmp_path, typed, prompts):
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text())
    apply_overrides(path, [f"evaluate.prompts={typed}"])
    assert parse_yaml(path.read_text(encoding="utf-8"), path)["evaluate"]["prompts"] == prompts
