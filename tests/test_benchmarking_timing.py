"""Turns, rounds and rotating inputs, on clocks that somebody turns by hand."""

from __future__ import annotations

import pytest
import torch

from llmfast.benchmarking.timing import Effort, Rotation, cache_bytes, take_turns, timed, warm_up


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def turns_of(clock: Clock, order: list[str], **seconds: float):
    def turn_of(name: str, takes: float):
        def turn() -> float:
            order.append(name)
            clock.now += takes
            return takes

        return turn

    return {name: turn_of(name, takes) for name, takes in seconds.items()}


def test_everybody_has_a_turn_in_every_round_and_another_begins_each():
    clock, order = Clock(), []
    turns = turns_of(clock, order, a=1.0, b=2.0, c=3.0)
    found = take_turns(turns, dict.fromkeys("abc", 1), Effort(seconds=0, rounds=(3, 9), turn=0.1), clock)
    assert found == {"a": [1.0] * 3, "b": [2.0] * 3, "c": [3.0] * 3}
    assert order == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]


def test_rounds_end_with_the_time_but_never_too_soon_or_late():
    def rounds(seconds: float, least: int, most: int) -> int:
        clock = Clock()
        found = take_turns(turns_of(clock, [], a=1.0), {"a": 1}, Effort(seconds, (least, most), turn=0.1), clock)
        return len(found["a"])

    assert rounds(0.0, 4, 9) == 4
    assert rounds(5.0, 1, 9) == 5
    assert rounds(100.0, 1, 9) == 9


def test_short_work_is_repeated_and_its_median_counts():
    order: list[int] = []

    def turn() -> float:
        order.append(1)
        return 50.0 if len(order) == 5 else 0.001  # an interruption that is not its own

    effort = Effort(0, (1, 1), turn=0.01)
    found = take_turns({"a": turn}, {"a": warm_up(turn, effort)}, effort, Clock())
    assert len(order) == 2 + 10 and found == {"a": [0.001]}


@pytest.mark.parametrize("seconds, called, calls", [(5.0, 1, 1), (0.004, 2, 3), (0.0, 2, 10_000)])
def test_slow_work_warms_up_once(seconds, called, calls):
    order: list[str] = []
    (turn,) = turns_of(Clock(), order, a=seconds).values()
    assert warm_up(turn, Effort(1, (2, 5), turn=0.012)) == calls and len(order) == called


def test_nobody_takes_no_turns():
    assert take_turns({}, {}, Effort(1, (2, 5), 0.1), Clock()) == {}


def test_preparing_is_not_timed():
    clock = Clock()

    def spend(seconds: float, result: str | None = None) -> str | None:
        clock.now += seconds
        return result

    seen: list[str] = []
    turn = timed(lambda prepared: (seen.append(prepared), spend(2.0)), lambda: spend(30.0, "ready"), clock=clock)
    assert turn() == 2.0 and seen == ["ready"]


def test_a_rotation_hands_out_what_was_unused_for_longest():
    first = torch.arange(6.0).view(2, 3).t()
    rotation = Rotation({"x": first, "bias": None}, cache=60)
    assert len(rotation) == 5 and not rotation.hot  # five of 24 bytes are twice the cache
    places = [rotation.next()["x"].data_ptr() for _ in range(10)]
    assert len(set(places[:5])) == 5 and places[:5] == places[5:]
    for _ in range(5):
        tensors = rotation.next()
        assert tensors["bias"] is None
        assert torch.equal(tensors["x"], first) and tensors["x"].stride() == first.stride()


@pytest.mark.parametrize("size, cache, sets, hot", [(1000, 10, 2, False), (1, 1 << 20, 2048, True)])
def test_large_inputs_have_two_places_and_tiny_ones_stay_in_the_cache(size, cache, sets, hot):
    rotation = Rotation({"x": torch.zeros(size)}, cache=cache)
    assert (len(rotation), rotation.hot) == (sets, hot)


def test_the_largest_cache_counts(tmp_path):
    for index, size in enumerate(["32K", "1024K", "30M"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert cache_bytes(tmp_path) == 30 << 20
    assert cache_bytes(tmp_path / "nowhere") > 0
