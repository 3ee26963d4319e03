"""Strict loading of params.yaml: values, error messages, and the sections themselves."""

import dataclasses
import errno
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import pytest

from folio import params
from folio.corpus.params import PrepareParams
from folio.errors import UserError
from folio.gpt.model import ModelParams
from folio.inference.evaluation import EvaluateParams
from folio.runtime import RuntimeParams
from folio.training.params import TrainParams

SHIPPED = Path(__file__).parent.parent / "params.yaml"
ALL = {
    "prepare": PrepareParams,
    "model": ModelParams,
    "train": TrainParams,
    "evaluate": EvaluateParams,
    "runtime": RuntimeParams,
}


@dataclass(frozen=True, kw_only=True)
class Section:
    steps: Annotated[int, ">= 1"]
    learning_rate: Annotated[float, "> 0, < 10"]
    patience: Annotated[int | None, ">= 1"]
    kind: Literal["small", "large"]
    fast: bool
    name: str
    offset: float
    temperatures: Annotated[list[float], ">= 0"]

    def __post_init__(self):
        if self.steps == 13:
            raise ValueError("steps: 13 is unlucky")


VALID = {
    "steps": "10",
    "learning_rate": "0.5",
    "patience": "3",
    "kind": "small",
    "fast": "true",
    "name": "mine",
    "offset": "-1.5",
    "temperatures": "[0.0, 1.0]",
}


@pytest.fixture
def write(tmp_path):
    """Write a params.yaml with a section train of VALID and these changes; None removes a key."""

    def write(**changes):
        values = {key: text for key, text in (VALID | changes).items() if text is not None}
        lines = ["train:", *(f"  {key}: {text}" for key, text in values.items())]
        (tmp_path / "params.yaml").write_text("\n".join(lines) + "\n")
        return tmp_path / "params.yaml"

    return write


def read(path):
    (section,) = params.load(path, train=Section)
    return section


def problems_of(path):
    """The problems in the error message, one per line, without the name of the file."""
    with pytest.raises(UserError) as error:
        read(path)
    start, _, problems = str(error.value).partition(": ")
    assert start == str(path)
    return problems.split("\n  ")


def problem_of(path):
    """The only problem in the error message."""
    (problem,) = problems_of(path)
    return problem


# --- valid files


def test_shipped_params_load():
    sections = params.load(SHIPPED, **ALL)
    assert [type(section) for section in sections] == list(ALL.values())
    assert tuple(ALL) == params.SECTIONS


def test_load_reads_params_yaml_in_the_current_folder_by_default(tmp_path, monkeypatch):
    shutil.copy(SHIPPED, tmp_path)
    monkeypatch.chdir(tmp_path)
    model, runtime = params.load(model=ModelParams, runtime=RuntimeParams)
    assert isinstance(model, ModelParams) and isinstance(runtime, RuntimeParams)


def test_load_converts_values_to_their_types(write):
    section = read(write())
    assert section == Section(
        steps=10,
        learning_rate=0.5,
        patience=3,
        kind="small",
        fast=True,
        name="mine",
        offset=-1.5,
        temperatures=[0.0, 1.0],
    )


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "0.00001", "1E-5", "'1e-5'"])
def test_float_is_read_in_every_notation(write, text):
    assert read(write(learning_rate=text)).learning_rate == 1e-5


def test_float_may_be_written_as_an_int(write):
    section = read(write(learning_rate="3", temperatures="[0, 1, 2e0]"))
    assert section.learning_rate == 3.0 and type(section.learning_rate) is float
    assert section.temperatures == [0.0, 1.0, 2.0]
    assert all(type(item) is float for item in section.temperatures)


def test_null_is_read_as_none_for_an_optional_field(write):
    assert read(write(patience="null")).patience is None
    assert read(write(patience="")).patience is None


def test_flatten_returns_full_names(write):
    flat = params.flatten(train=read(write()), again=read(write(steps="2")))
    assert flat["train.learning_rate"] == 0.5 and flat["again.steps"] == 2
    assert len(flat) == 2 * len(VALID)


# --- errors


def test_unknown_key_error_suggests_a_similar_key(write):
    problem = problem_of(write(learnign_rate="0.1"))
    assert problem == "train.learnign_rate: unknown; did you mean train.learning_rate?"


def test_unknown_key_error_without_a_similar_key_says_remove_it(write):
    assert problem_of(write(zzz="1")) == "train.zzz: unknown; remove it"


def test_missing_key_error_states_the_expected_type(write):
    problem = problem_of(write(learning_rate=None))
    assert problem == "train.learning_rate: missing; add it to params.yaml: a float > 0, < 10"


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("steps", "true", "an int"),  # a bool is not an int
        ("steps", "10.0", "an int"),
        ("steps", "'10'", "an int"),
        ("steps", "1e3", "an int"),
        ("steps", "null", "an int"),
        ("steps", "[10]", "an int"),
        ("steps", "0", ">= 1"),
        ("learning_rate", "true", "a float"),
        ("learning_rate", "fast", "a float"),
        ("learning_rate", "''", "a float"),
        ("learning_rate", "null", "a float"),
        ("offset", ".nan", "a float"),
        ("offset", ".inf", "a float"),
        ("offset", "-.inf", "a float"),
        ("offset", "nan", "a float"),
        ("offset", "inf", "a float"),
        ("offset", "1e999", "a float"),
        ("offset", "1" + 400 * "0", "a float"),
        ("learning_rate", "0", "> 0"),
        ("learning_rate", "10", "< 10"),
        ("patience", "0", "an int or null"),
        ("patience", "never", "an int or null"),
        ("patience", "false", "an int or null"),
        ("kind", "medium", "one of small, large"),
        ("kind", "null", "one of small, large"),
        ("kind", "1", "one of small, large"),
        ("fast", "1", "true or false"),
        ("fast", "yes", "true or false"),  # of YAML 1.1
        ("steps", "1:40", "an int"),  # of YAML 1.1
        ("learning_rate", "1:40.5", "a float"),
        ("learning_rate", "1e1_0", "a float"),  # Python's float would read it
        ("learning_rate", ".5e3", "a float"),  # a string for DVC
        ("fast", "'true'", "true or false"),
        ("fast", "null", "true or false"),
        ("name", "1", "a string"),
        ("name", "null", "a string"),
        ("temperatures", "1.0", "a list of floats"),
        ("temperatures", "null", "a list of floats"),
        ("temperatures", "[1.0, hot]", "a list of floats"),
        ("temperatures", "[1.0, null]", "a list of floats"),
        ("temperatures", "[1.0, -0.1]", ">= 0"),
    ],
)
def test_invalid_value_error_states_the_expected_type(write, key, text, expected):
    problem = problem_of(write(**{key: text}))
    assert problem.startswith(f"train.{key}: ")
    _, separator, description = problem.partition(" is not valid; expected ")
    assert separator and expected in description


@pytest.mark.parametrize(
    ("key", "text"),
    [("steps", "1"), ("learning_rate", "9.99"), ("patience", "1"), ("temperatures", "[]")],
)
def test_values_at_the_bounds_are_accepted(write, key, text):
    read(write(**{key: text}))


def test_section_checks_several_fields_together(write):
    assert problem_of(write(steps="13")) == "train.steps: 13 is unlucky"


def test_keep_last_contradicts_patience(tmp_path):
    (tmp_path / "params.yaml").write_text(SHIPPED.read_text().replace("keep: best", "keep: last"))
    with pytest.raises(UserError) as error:
        params.load(tmp_path / "params.yaml", train=TrainParams)
    assert str(error.value).endswith(
        "train.patience: must be empty with keep: last, which keeps the weights of the last step of"
        " the schedule"
    )


def test_error_message_lists_all_problems(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(
        "modle: {}\n"
        "model: {n_layer: 0, n_head: two, n_embd: 8, block_size: 8, dropot: 0.1}\n"
        "train: 1\n"
        "evaluate:\n"
    )
    with pytest.raises(UserError) as error:
        params.load(path, **ALL)
    assert str(error.value) == f"{path}: " + "\n  ".join(
        [
            "modle: unknown section; did you mean model?",
            "prepare: missing section",
            "model.dropot: unknown; did you mean model.dropout?",
            "model.n_layer: 0 is not valid; expected an int >= 1",
            "model.n_head: 'two' is not valid; expected an int >= 1",
            "model.dropout: missing; add it to params.yaml: a float >= 0, < 1",
            "train: not a section; expected keys with values",
            "evaluate: missing section",
            "runtime: missing section",
        ]
    )


def test_n_embd_error_has_the_full_name_of_the_param(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("model: {n_layer: 1, n_head: 6, n_embd: 100, block_size: 8, dropout: 0.0}\n")
    with pytest.raises(
        UserError, match=r"model\.n_embd: 100 is not divisible by n_head 6; try 102"
    ):
        params.load(path, model=ModelParams)


def test_missing_file_error_states_where_to_run_the_command(tmp_path):
    with pytest.raises(
        UserError, match=r"params\.yaml is missing: run this in the root folder of the project"
    ):
        read(tmp_path / "params.yaml")


@pytest.mark.parametrize("text", ["train: {steps: 1", "a: b: c", "\ttrain:", "- [", "x: '"])
def test_yaml_syntax_error_is_one_line_with_the_line_number(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text("# first\n" + text + "\n")
    with pytest.raises(UserError, match=r"is not valid YAML at line [23]: fix it") as error:
        read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"name: \xff\xfe\xfa", "is not valid UTF-8 at byte 6: fix it"),
        (b"when: 2024-13-45\n", "is not valid YAML"),
    ],
)
def test_undecodable_yaml_is_a_one_line_error(tmp_path, content, problem):
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=problem) as error:
        read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "# nothing", "train", "- train", "1"])
def test_file_without_sections_error_lists_the_sections(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="has no sections: it needs prepare, model, train"):
        read(path)


@pytest.mark.parametrize("second", ["steps", "'steps'", '"st\\x65ps"'])
def test_duplicate_key_error_states_the_line(write, second):
    path = write()
    path.write_text(path.read_text() + f"  {second}: 20\n")
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value) == f"{path}: line 10: duplicate key steps: keep one of them"


def test_duplicate_section_error_states_the_line(write):
    path = write()
    path.write_text(path.read_text() + "train: {steps: 20}\n")
    with pytest.raises(UserError, match="line 10: duplicate key train: keep one of them"):
        read(path)


@pytest.mark.parametrize(
    "text", ["x: " + "[" * 100_000, "x: " + "{a: " * 100_000, "- " * 9_999, "? " * 9_999]
)
def test_deep_nesting_error_is_one_line_with_the_line_number(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text("train: 1\nmodel:\n" + text)
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: line 3: nested more than 10 levels deep")


def test_nested_aliases_are_shortened_in_the_error(write):
    path = write(name="*i")
    levels = "".join(f"{b}: &{b} [{', '.join(10 * ['*' + a])}]\n" for a, b in pairwise("abcdefghi"))
    path.write_text(f"a: &a x\n{levels}" + path.read_text())
    problem = next(line for line in problems_of(path) if line.startswith("train.name: "))
    assert problem.startswith("train.name: [[[...], [...]") and len(problem) < 500


def test_alias_may_repeat_a_value(write):
    section = read(write(steps="&n 7", patience="*n"))
    assert (section.steps, section.patience) == (7, 7)


def test_merge_keys_are_rejected_because_each_one_doubles_the_size(tmp_path):
    path = tmp_path / "params.yaml"
    levels = "".join(f"{b}: &{b} {{<<: [*{a}, *{a}]}}\n" for a, b in pairwise("abcdefghijklmnop"))
    path.write_text("a: &a {x: 1}\n" + levels)
    with pytest.raises(UserError, match=r"line 2: merge keys \(`<<`\) are not supported"):
        read(path)


@pytest.mark.parametrize("text", ["!!int ''", "!!bool perhaps", "!!timestamp x", "!!python/none"])
def test_tags_are_rejected(write, text):
    path = write(steps=text)
    with pytest.raises(UserError, match="line 2: tags such as !!str are not supported"):
        read(path)


@pytest.mark.parametrize("digits", [16, 4_000, 100_000])
def test_huge_int_is_shown_by_its_number_of_bits(write, digits):
    problem = problem_of(write(steps="0x" + "f" * digits))
    assert problem == f"train.steps: an int of {4 * digits} bits is not valid; expected an int >= 1"
    assert len(problem_of(write(**{f"? 0x{'f' * digits}\n  ": "1"}))) < 100


def test_number_that_python_cannot_parse_is_a_one_line_error(write):
    path = write(steps="1" * 5_000)
    with pytest.raises(UserError, match="is not valid YAML") as error:
        read(path)
    assert "\n" not in str(error.value)


def test_number_that_yaml_1_1_reads_differently_is_a_one_line_error(write):
    path = write(steps="0042")
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value) == (
        f"{path}: line 2: train.steps: 0042 is 42 in YAML 1.2, which DVC reads, and 34 in YAML 1.1:"
        " write 42"
    )


@pytest.mark.parametrize("key", ['"two\\nlines"', '"\\e[31m"', "'" + "x" * 500 + "'", "''"])
def test_unprintable_or_long_key_is_quoted_in_the_error(write, key):
    problem = problem_of(write(**{key: "1"}))
    assert problem.startswith("train.'") and problem.isprintable() and len(problem) < 150


def test_long_value_is_shortened_in_the_error(write):
    problem = problem_of(write(kind="x" * 100_000))
    assert problem.startswith("train.kind: 'xxxxx") and len(problem) < 200


def test_folder_instead_of_a_file_is_a_one_line_error(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read \(it is a folder\): fix it") as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


def test_unreadable_file_is_a_one_line_error(write, monkeypatch):
    def deny(path, **_):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    path = write()
    monkeypatch.setattr(Path, "read_bytes", deny)
    with pytest.raises(UserError, match=r"params\.yaml cannot be read \(Permission denied\)"):
        read(path)


# --- single values


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("train.learning_rate", "1e-3", 1e-3),
        ("train.steps", "5", 5),
        ("train.patience", "null", None),
        ("train.kind", "large", "large"),
    ],
)
def test_read_value_converts_to_the_type_of_the_param(name, text, value):
    assert params.read_value(name, text, train=Section) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train.stepz", "5", "train.stepz: unknown; did you mean train.steps?"),
        ("zzz", "5", "zzz: unknown; expected one of train.*"),
        ("train.steps", "ten", "train.steps: 'ten' is not valid; expected an int >= 1"),
        ("train.steps", "[1", "train.steps: '[1' is not valid; expected an int >= 1"),
    ],
)
def test_read_value_error_names_the_param(name, text, message):
    with pytest.raises(UserError) as error:
        params.read_value(name, text, train=Section)
    assert str(error.value) == message


# --- sections


@pytest.mark.parametrize("cls", ALL.values(), ids=list(ALL))
def test_sections_are_frozen_and_have_no_defaults(cls):
    assert cls.__dataclass_params__.frozen
    for field in dataclasses.fields(cls):
        assert field.kw_only, field.name
        assert field.default is dataclasses.MISSING, field.name
        assert field.default_factory is dataclasses.MISSING, field.name


@pytest.mark.parametrize("changes", [{"optimizer": "muon"}, {"factored_embedding": True}])
def test_whole_matrices_contradict_fsdp(changes):
    [train] = params.load(SHIPPED, train=TrainParams)
    train = dataclasses.replace(train, optimizer="adamw", factored_embedding=False)
    assert dataclasses.replace(train, parallel="ddp", **changes)
    assert dataclasses.replace(train, parallel="fsdp")
    with pytest.raises(ValueError, match="parallel: must be auto, none or ddp"):
        dataclasses.replace(train, parallel="fsdp", **changes)


@pytest.mark.parametrize(
    "changes", [{"precision": "fp32"}, {"compile": "never"}, {"parallel": "fsdp"}]
)
def test_fp8_head_contradicts_what_has_no_fused_kernels(changes):
    [train] = params.load(SHIPPED, train=TrainParams)
    train = dataclasses.replace(train, optimizer="adamw", factored_embedding=False)
    assert dataclasses.replace(train, fp8_head=True, precision="fp16", compile="always")
    [name] = changes
    with pytest.raises(ValueError, match=f"fp8_head: must be false with .*{name}: "):
        dataclasses.replace(train, fp8_head=True, **changes)
