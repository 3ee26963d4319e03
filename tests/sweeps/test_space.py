"""The search space of a sweep and the trials drawn from it."""

from typing import Any

import pytest

from folio.errors import UserError
from folio.sweeps.plan import make_trials
from folio.sweeps.space import Choice, Range, format_trial, is_log_scale

RATE = "train.learning_rate"


def trials(*settings: str, count: int | None = None, seed: int = 1) -> list[dict[str, Any]]:
    return make_trials(list(settings), count, seed)


def test_grid_is_every_combination_with_values_of_the_right_types():
    assert trials("train.learning_rate=1e-3,2e-3", "train.patience=3,null") == [
        {"train.learning_rate": 0.001, "train.patience": 3},
        {"train.learning_rate": 0.001, "train.patience": None},
        {"train.learning_rate": 0.002, "train.patience": 3},
        {"train.learning_rate": 0.002, "train.patience": None},
    ]
    [trial] = trials("train.learning_rate=1", "train.precision=fp32", "train.deterministic=false")
    assert [type(value) for value in trial.values()] == [float, str, bool]


def test_random_trials_are_a_function_of_the_seed():
    settings = ("train.learning_rate=1e-4..1e-2", "model.n_layer=1..4")
    assert trials(*settings, count=8) == trials(*settings, count=8)
    assert trials(*settings, count=8) != trials(*settings, count=8, seed=2)


def test_range_between_ints_gives_each_int_equally_often():
    drawn = [
        trial["model.n_layer"]
        for trial in trials("model.n_layer=2..5", RATE + "=1e-4..1", count=40)
    ]
    assert {type(value) for value in drawn} == {int}
    assert [drawn.count(value) for value in (2, 3, 4, 5)] == [10, 10, 10, 10]


def test_wide_range_is_sampled_on_a_log_scale_unless_a_prefix_overrides_that():
    def below(setting: str, value: float) -> int:
        return sum(trial[RATE] < value for trial in trials(setting, count=20))

    assert below(f"{RATE}=1e-4..1e-2", 1e-3) == 10
    assert below(f"{RATE}=lin:1e-4..1e-2", 5.05e-3) == 10
    assert below(f"{RATE}=2e-3..8e-3", 5e-3) == 10
    assert below(f"{RATE}=log:2e-3..8e-3", 4e-3) == 10


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize(("low", "high"), [(1, 1000), (0.00123456, 0.0987654)])
def test_range_never_gives_a_value_outside_itself(low, high, log):
    drawn = [Range(low, high, log).at(u) for u in (0.0, 0.5, 1 - 1e-16, 1 - 1e-9)]
    assert all(low <= value <= high for value in drawn)


def test_choice_divides_the_interval_evenly():
    assert [Choice(("a", "b")).at(u) for u in (0, 0.49, 0.5, 0.999)] == ["a", "a", "b", "b"]


def test_random_trials_are_distinct():
    drawn = trials("model.n_layer=1,2", "train.seed=1,2", count=50)
    assert len(drawn) == 4 and {type(each) for trial in drawn for each in trial.values()} == {int}


@pytest.mark.parametrize(
    ("settings", "count", "message"),
    [
        ([], None, "nothing to vary"),
        (["train.learning_rate"], None, "'train.learning_rate' is not a setting"),
        (["=3"], None, "'=3' is not a setting"),
        (["train.learnign_rate=1"], None, "did you mean train.learning_rate?"),
        (["evaluate.stride=1,2"], None, "a sweep can only vary params of model and train"),
        (["train.steps=10,ten"], None, "train.steps: 'ten' is not valid; expected an int >= 1"),
        (["train.steps=1.5"], None, "train.steps: '1.5' is not valid"),
        (["train.steps=[1"], None, "train.steps: '[1' is not valid"),
        (["train.beta1=0.5,1"], None, "expected a float >= 0, < 1"),
        (["train.steps=10,,20"], None, "a value is missing"),
        (["train.steps=10,10"], None, "a value is given twice"),
        (["train.learning_rate=1e-3,0.001"], None, "a value is given twice"),
        (["train.steps=10", "train.steps=20"], None, "train.steps is given twice"),
        (["train.learning_rate=1e-4..1e-2"], None, "`--random 20` samples a range"),
        (["train.steps=1..9", "train.seed=1..5"], 0, "--random 0: use a number from 1 to 500"),
        (["train.steps=9..1"], 4, "a range needs a lower and a higher end"),
        (["train.steps=1..."], 4, "train.steps: '.' is not valid"),
        (["train.precision=bf16..fp32"], 4, "a range needs a lower and a higher end"),
        (["train.learning_rate=ln:1e-4..1e-2"], 4, "log:low..high or lin:low..high"),
        (["model.dropout=log:0..0.5"], 4, "a log range must be above 0"),
        ([f"train.{key}={','.join(map(str, range(1, 31)))}" for key in ("seed", "steps")], None,
         "900 trials are more than 500"),
    ],
)  # fmt: skip
def test_invalid_settings_are_reported_on_one_line(settings, count, message):
    with pytest.raises(UserError) as error:
        trials(*settings, count=count)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_format_trial_writes_a_trial_like_the_command_line():
    trial = {"train.learning_rate": 1e-4, "train.patience": None, "train.deterministic": True}
    trial |= {"train.beta2": 0.99999999, "train.init_from": "GPT2-Größe"}
    assert format_trial(trial) == (
        "train.learning_rate=0.0001 train.patience=null train.deterministic=true"
        " train.beta2=0.99999999 train.init_from=GPT2-Größe"
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1e-3, 3e-3, 1e-2], True),
        ([1, 2, 4, 8, 16], True),
        ([0.01, 0.1, 0.2, 0.3], False),  # evenly spaced, apart from the first
        ([1, 2, 3], False),
        ([0.0, 1e-3, 1.0], False),
        (["a", "b"], False),
        ([True, False], False),
    ],
)
def test_log_scale_suits_values_that_span_a_power_of_ten_evenly(values, expected):
    assert is_log_scale(values) is expected
