"""The parallel coordinates plot of a sweep."""

import pytest
from PIL import Image

from folio.sweeps.parallel_coordinates import Scale, draw
from folio.sweeps.plan import make_trials


@pytest.mark.parametrize(
    ("count", "loss"),
    [
        (3, lambda i: 5 - i / 10),
        (60, lambda i: 5 + i % 7),
        (4, lambda i: 5.0),
        (5, lambda i: 10.0**i),
    ],
    ids=["few", "many", "equal losses", "outliers"],
)
def test_draw_writes_a_plot(count, loss, tmp_path):
    settings = ["train.learning_rate=1e-4..1e-2", "train.patience=null,3"]
    settings += ["train.compile=auto,never", "model.dropout=0..0.3"]
    trials = make_trials(settings, count, 1)
    draw(trials, [loss(i) for i in range(len(trials))], tmp_path / "plot.png")
    image = Image.open(tmp_path / "plot.png")
    assert image.size[0] > 1000 and len(image.convert("RGB").getcolors(10**6)) > 100


def test_scale_puts_low_values_at_the_bottom_and_null_at_the_top():
    scale = Scale([5, None, 3])
    assert [scale.position(value) for value in (3, 5, None)] == [0, 0.5, 1]


def test_scale_is_logarithmic_for_values_on_a_log_scale():
    assert Scale([1e-3, 1e-2, 1e-1]).position(1e-2) == pytest.approx(0.5)
    assert Scale([0.01, 0.1, 0.2, 0.3]).log is False


def test_scale_labels_few_values_and_round_numbers_otherwise():
    assert [label for _, label in Scale([3, 1, 2]).ticks()] == ["1", "2", "3"]
    many = [10 ** (-4 + i / 10) for i in range(21)]
    assert [label for _, label in Scale(many).ticks()] == [
        "0.0001", "0.0002", "0.0005", "0.001", "0.002", "0.005", "0.01",
    ]  # fmt: skip
    assert [label for _, label in Scale(list(range(1, 21))).ticks()] == ["4", "8", "12", "16", "20"]


def test_scale_writes_round_numbers_without_rounding_errors():
    losses = Scale([5.3596, 5.5697, 5.5708, 5.6694, 5.6982, 5.7138])
    labels = [label for _, label in losses.ticks(round_numbers=True)]
    assert labels == ["5.36", "5.44", "5.52", "5.6", "5.68"]


def test_scale_labels_all_values_that_are_not_only_numbers():
    assert len(Scale([*range(9), None]).ticks()) == 10


def test_scale_leaves_out_labels_that_would_overlap():
    assert [label for _, label in Scale([1, 1.01, 90, 99]).ticks()] == ["1", "90", "99"]
