"""params.yaml is read strictly, and every problem is named at once."""

import dataclasses
import errno
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import pytest

from folio import params
from folio.errors import UserError
from folio.gpt.model import ModelParams
from folio.runtime import RuntimeParams
from stages.evaluate import EvaluateParams
from stages.prepare import PrepareParams
from stages.train import TrainParams

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
            raise ValueError("steps: 13 brings bad luck")


GOOD = {
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
    """Write a params.yaml whose section train is GOOD with these keys changed; None: left out."""

    def write(**changes):
        values = {key: text for key, text in (GOOD | changes).items() if text is not None}
        lines = ["train:", *(f"  {key}: {text}" for key, text in values.items())]
        (tmp_path / "params.yaml").write_text("\n".join(lines) + "\n")
        return tmp_path / "params.yaml"

    return write


def read(path):
    (section,) = params.load(path, train=Section)
    return section


def refusals(path):
    """The problems that a user reads, a line each, without the file's name."""
    with pytest.raises(UserError) as error:
        read(path)
    start, _, problems = str(error.value).partition(": ")
    assert start == str(path)
    return problems.split("\n  ")


def refused(path):
    """The one problem."""
    (problem,) = refusals(path)
    return problem


# --- what is read


def test_the_shipped_file_loads():
    sections = params.load(SHIPPED, **ALL)
    assert [type(section) for section in sections] == list(ALL.values())
    assert tuple(ALL) == params.SECTIONS


def test_the_shipped_file_loads_in_the_projects_root(tmp_path, monkeypatch):
    shutil.copy(SHIPPED, tmp_path)
    monkeypatch.chdir(tmp_path)
    model, runtime = params.load(model=ModelParams, runtime=RuntimeParams)
    assert isinstance(model, ModelParams) and isinstance(runtime, RuntimeParams)


def test_values_come_with_their_types(write):
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
def test_a_float_may_be_written_in_any_way(write, text):
    assert read(write(learning_rate=text)).learning_rate == 1e-5


def test_an_int_will_do_for_a_float(write):
    section = read(write(learning_rate="3", temperatures="[0, 1, 2e0]"))
    assert section.learning_rate == 3.0 and type(section.learning_rate) is float
    assert section.temperatures == [0.0, 1.0, 2.0]
    assert all(type(item) is float for item in section.temperatures)


def test_null_is_taken_where_it_may_be(write):
    assert read(write(patience="null")).patience is None
    assert read(write(patience="")).patience is None


def test_sections_are_flattened_to_full_names(write):
    flat = params.flatten(train=read(write()), again=read(write(steps="2")))
    assert flat["train.learning_rate"] == 0.5 and flat["again.steps"] == 2
    assert len(flat) == 2 * len(GOOD)


# --- what is refused


def test_an_unknown_key_is_named_with_the_nearest_right_one(write):
    problem = refused(write(learnign_rate="0.1"))
    assert problem == "train.learnign_rate: unknown; did you mean train.learning_rate?"


def test_an_unknown_key_that_is_near_to_none_is_to_be_removed(write):
    assert refused(write(zzz="1")) == "train.zzz: unknown; remove it"


def test_a_missing_key_is_named_with_what_it_takes(write):
    problem = refused(write(learning_rate=None))
    assert problem == "train.learning_rate: missing; it takes a float > 0, < 10"


@pytest.mark.parametrize(
    ("key", "text", "takes"),
    [
        ("steps", "true", "an int"),  # a bool is no int
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
        ("fast", "'true'", "true or false"),
        ("fast", "null", "true or false"),
        ("name", "1", "a string"),
        ("name", "null", "a string"),
        ("temperatures", "1.0", "a list of a float"),
        ("temperatures", "null", "a list of a float"),
        ("temperatures", "[1.0, hot]", "a list of a float"),
        ("temperatures", "[1.0, null]", "a list of a float"),
        ("temperatures", "[1.0, -0.1]", ">= 0"),
    ],
)
def test_a_value_that_will_not_do_is_named_with_what_the_key_takes(write, key, text, takes):
    problem = refused(write(**{key: text}))
    assert problem.startswith(f"train.{key}: ")
    assert "will not do; it takes " in problem and takes in problem.split("takes ")[1]


@pytest.mark.parametrize(
    ("key", "text"),
    [("steps", "1"), ("learning_rate", "9.99"), ("patience", "1"), ("temperatures", "[]")],
)
def test_the_last_value_within_bounds_is_taken(write, key, text):
    read(write(**{key: text}))


def test_what_no_single_key_shows_is_named_by_the_section(write):
    assert refused(write(steps="13")) == "train.steps: 13 brings bad luck"


def test_every_problem_is_named_at_once(tmp_path):
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
            "model.n_layer: 0 will not do; it takes an int >= 1",
            "model.n_head: 'two' will not do; it takes an int >= 1",
            "model.dropout: missing; it takes a float >= 0, < 1",
            "train: not a section",
            "evaluate: missing section",
            "runtime: missing section",
        ]
    )


def test_a_width_that_heads_cannot_share_is_named_in_full(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("model: {n_layer: 1, n_head: 6, n_embd: 100, block_size: 8, dropout: 0.0}\n")
    with pytest.raises(
        UserError, match=r"model\.n_embd: 100 is not divisible by n_head 6; take 102"
    ):
        params.load(path, model=ModelParams)


def test_a_missing_file_says_where_to_run(tmp_path):
    with pytest.raises(UserError, match=r"params\.yaml is missing: run this in the project's root"):
        read(tmp_path / "params.yaml")


@pytest.mark.parametrize("text", ["train: {steps: 1", "a: b: c", "\ttrain:", "- [", "x: '"])
def test_what_is_not_yaml_is_one_line_with_its_place(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text("# first\n" + text + "\n")
    with pytest.raises(UserError, match=r"is not YAML at line [23]: mend it") as error:
        read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"name: \xff\xfe\xfa", b"when: 2024-13-45\n"])
def test_what_yaml_cannot_mean_is_one_line(tmp_path, content):
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not YAML") as error:
        read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "# nothing", "train", "- train", "1"])
def test_a_file_without_sections_is_told_which_it_needs(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="holds no sections: it needs prepare, model, train"):
        read(path)


@pytest.mark.parametrize("second", ["steps", "'steps'", '"st\\x65ps"'])
def test_a_key_that_comes_twice_is_named_with_its_line(write, second):
    path = write()
    path.write_text(path.read_text() + f"  {second}: 20\n")
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value) == f"{path}: line 10: steps is there twice: keep one of them"


def test_a_section_that_comes_twice_is_named_with_its_line(write):
    path = write()
    path.write_text(path.read_text() + "train: {steps: 20}\n")
    with pytest.raises(UserError, match="line 10: train is there twice: keep one of them"):
        read(path)


@pytest.mark.parametrize(
    "text", ["x: " + "[" * 100_000, "x: " + "{a: " * 100_000, "- " * 9_999, "? " * 9_999]
)
def test_deep_nesting_is_one_line_with_its_place(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text("train: 1\nmodel:\n" + text)
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: line 3: more than 10 levels deep")


def test_aliases_that_multiply_are_shown_shortened(write):
    path = write(name="*i")
    laughs = "".join(f"{b}: &{b} [{', '.join(10 * ['*' + a])}]\n" for a, b in pairwise("abcdefghi"))
    path.write_text(f"a: &a lol\n{laughs}" + path.read_text())
    problem = next(line for line in refusals(path) if line.startswith("train.name: "))
    assert problem.startswith("train.name: [[[...], [...]") and len(problem) < 500


def test_a_value_may_be_written_once_and_meant_twice(write):
    section = read(write(steps="&n 7", patience="*n"))
    assert (section.steps, section.patience) == (7, 7)


def test_merge_keys_are_refused_for_each_doubles_what_it_merges(tmp_path):
    path = tmp_path / "params.yaml"
    levels = "".join(f"{b}: &{b} {{<<: [*{a}, *{a}]}}\n" for a, b in pairwise("abcdefghijklmnop"))
    path.write_text("a: &a {x: 1}\n" + levels)
    with pytest.raises(UserError, match="line 2: `<<` is not read: write out the keys"):
        read(path)


@pytest.mark.parametrize("text", ["!!int ''", "!!bool perhaps", "!!timestamp x", "!!python/none"])
def test_a_tag_is_refused(write, text):
    path = write(steps=text)
    with pytest.raises(UserError, match="line 2: a tag such as !!str is not read"):
        read(path)


@pytest.mark.parametrize("digits", [16, 4_000, 100_000])
def test_an_int_of_any_length_is_shown_by_its_size(write, digits):
    problem = refused(write(steps="0x" + "f" * digits))
    assert problem == f"train.steps: an int of {4 * digits} bits will not do; it takes an int >= 1"
    assert len(refused(write(**{f"? 0x{'f' * digits}\n  ": "1"}))) < 100


@pytest.mark.parametrize("text", ["1" * 5_000, "1:" * 300 + "0.5"])
def test_a_number_that_python_cannot_read_is_one_line(write, text):
    path = write(steps=text)
    with pytest.raises(UserError, match="is not YAML") as error:
        read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ['"two\\nlines"', '"\\e[31m"', "'" + "x" * 500 + "'", "''"])
def test_a_key_that_does_not_read_as_a_name_is_quoted(write, key):
    problem = refused(write(**{key: "1"}))
    assert problem.startswith("train.'") and problem.isprintable() and len(problem) < 150


def test_a_long_value_is_shortened(write):
    problem = refused(write(kind="x" * 100_000))
    assert problem.startswith("train.kind: 'xxxxx") and len(problem) < 200


def test_a_folder_in_place_of_the_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\): mend it") as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


def test_a_file_that_may_not_be_read_is_one_line(write, monkeypatch):
    def refuse(path, **_):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    path = write()
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(UserError, match=r"params\.yaml cannot be read \(Permission denied\)"):
        read(path)


# --- the sections themselves


@pytest.mark.parametrize("cls", ALL.values(), ids=list(ALL))
def test_a_section_is_frozen_and_without_defaults(cls):
    assert cls.__dataclass_params__.frozen
    for field in dataclasses.fields(cls):
        assert field.kw_only, field.name
        assert field.default is dataclasses.MISSING, field.name
        assert field.default_factory is dataclasses.MISSING, field.name
