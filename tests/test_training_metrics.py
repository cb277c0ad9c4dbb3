"""What a run measured: taken back after a checkpoint, readable after a kill, and shown."""

import json
import math

import pytest

from llmfast.training.display import Display, duration
from llmfast.training.metrics import METRICS, Metrics, read, top_of


def row(step, **figures):
    return {"step": step, **figures}


def test_what_was_measured_after_the_step_is_taken_back(tmp_path):
    Metrics(tmp_path).add([row(1, loss=3.5), row(2, loss=2.25), row(2, validation_loss=2.0), row(3, loss=2.125)])
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"step": 4, "lo')  # killed while it was written
    resumed = Metrics(tmp_path, step=2)
    assert (
        resumed.rows == read(tmp_path / METRICS) == [row(1, loss=3.5), row(2, loss=2.25), row(2, validation_loss=2.0)]
    )
    resumed.add([row(3, loss=2.0)])
    lines = (tmp_path / METRICS).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 2, 3]


def test_what_is_no_number_is_left_out_and_the_file_stays_json(tmp_path):
    Metrics(tmp_path).add([row(1, loss=math.nan, lr=0.5), row(2, loss=1.0, gradient_norm=math.inf)])
    assert read(tmp_path / METRICS) == [row(1, lr=0.5), row(2, loss=1.0)]
    assert "NaN" not in (tmp_path / METRICS).read_text()


@pytest.mark.parametrize("rows", [[], [row(1, loss=2.0)], [row(i, loss=1 / i) for i in range(1, 300)]])
def test_any_number_of_rows_can_be_drawn(rows, tmp_path):
    pytest.importorskip("matplotlib")
    metrics = Metrics(tmp_path)
    metrics.add([*rows, row(300, validation_loss=1.0)])
    path = metrics.draw()
    assert path is not None and path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


def test_the_display_says_how_fast_and_how_much_longer(capsys):
    display = Display(steps=100, flops_per_token=1e6, peak=1e10)
    with display:
        display.update(50, 2.5, steps=10, tokens=1000, seconds=0.5)
    assert "step 50 of 100  loss 2.5000  2,000 tokens/s  20% of peak  2 s left" in capsys.readouterr().err


def test_no_evaluation_is_above_the_picture():
    assert top_of([0.1, 0.02], [0.5, float("nan"), 0.4]) == pytest.approx(0.51)
    assert top_of([9.0, *[1.0] * 99], [1.5]) == pytest.approx(1.53)  # the first losses may be
    assert top_of([float("nan")], []) > 0
