"""Strict YAML: the values are those that DVC reads, or the file is rejected with a line."""

import pytest
from dvc.utils.serialize import parse_yaml

from folio import strict_yaml


def rejection(text):
    with pytest.raises(strict_yaml.RejectedError) as error:
        strict_yaml.load(text)
    return error.value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("0042", "train.seed: 0042 is 42 in YAML 1.2, which DVC reads, and 34 in YAML 1.1: wr"),
        ("-010", "train.seed: -010 is -10 in YAML 1.2, which DVC reads, and -8 in YAML 1.1"),
        ("0_10", "train.seed: 0_10 is 10 in YAML 1.2, which DVC reads, and 8 in YAML 1.1"),
        ("08", "train.seed: 08 is 8 in YAML 1.2, which DVC reads, and '08' in YAML 1.1"),
        ("0o17", "train.seed: 0o17 is 15 in YAML 1.2, which DVC reads, and '0o17' in YAML 1.1"),
        ("+_", "train.seed: +_ is not a number"),
        ("0x_", "train.seed: 0x_ is not a number"),
        ("._", "train.seed: ._ is not a number"),
    ],
)
def test_int_that_two_yaml_versions_read_differently_is_rejected(text, problem):
    error = rejection(f"# first\ntrain:\n  seed: {text}\n")
    assert error.line == 3 and error.problem.startswith(problem)
    assert rejection(f"train: {{seeds: [1, {text}]}}").problem.startswith("train.seeds: ")


@pytest.mark.parametrize(
    "text",
    ["1e-5", "1E5", "1.5e5", "-.5", ".5", ".5e3", "1.", "1_000", "1_0.5", "0b11", "0x1F", "007"]
    + ["yes", "no", "On", "OFF", "y", "N", "true", "FALSE", "null", "~", "1:40", "1:40.5", "12:30"]
    + ["'no'", "'0042'", "'1e-5'", "2024-01-01", ".inf", "nan", "1e1_0", "ROMEO:", "a: b"],
)
def test_scalar_has_the_value_that_dvc_reads(text):
    document = f"x:\n- {text}\n"
    [value], [in_dvc] = strict_yaml.load(document)["x"], parse_yaml(document, "params.yaml")["x"]
    assert type(value) is type(in_dvc) and value == in_dvc


@pytest.mark.parametrize("document", ["%YAML 1.1\n---\nx: no\n", "%TAG ! tag:a,2000:\n---\nx: 1\n"])
def test_directive_is_rejected(document):
    assert "directives such as %YAML are not supported" in rejection(document).problem


@pytest.mark.parametrize("character", ["\x85", "\u2028", "\u2029"])
def test_line_break_of_yaml_1_1_is_rejected_even_in_a_comment(character):
    error = rejection(f"x: 1\n# comment{character}y: 2\n")
    assert error.line == 2 and f'"\\u{ord(character):04x}"' in error.problem
    assert strict_yaml.load(f'x: "\\u{ord(character):04x}"') == {"x": character}


@pytest.mark.parametrize("text", [r'"\ud83d"', r'"\ud83d\ude00"', r'"a\udcff"'])
def test_half_of_a_surrogate_pair_is_rejected(text):
    error = rejection(f"evaluate:\n  prompts:\n  - {text}\n")
    assert error.line == 3 and error.problem.startswith("evaluate.prompts: an escape such as")
    assert "write the character itself" in error.problem
