"""A comparison becomes records: limits, ratios, problems. Times are made up."""

from __future__ import annotations

import pytest

from llmfast.benchmarking.comparison import Comparison, Contestant, Entry, Work, WrongResult, run
from llmfast.benchmarking.timing import Effort

TWO = Effort(seconds=0.0, rounds=(2, 2), turn=0.0)
LIMITS = {
    "threads": 2,
    "read": {"2": {"median": 9.0, "best": 10.0}},
    "copy": {"2": {"median": 4.0, "best": 5.0}},
    "fp32": {"2": {"median": 90.0, "best": 100.0}},
    "bf16": None,
}


def comparison(seconds: dict[str, list[float]], work: Work = Work(), **more) -> Comparison:  # noqa: B008
    """Competitors "name precision" with the seconds of their calls; ones without any are wrong."""

    def ready(entry: Entry) -> Contestant:
        if not seconds[str(entry)]:
            raise WrongResult("wrong, so not timed: by far")
        calls = iter([0.3, *seconds[str(entry)]])  # one to warm up, slow enough to be the only one
        return Contestant(lambda: next(calls), checked=0.5)

    return Comparison(
        group="ops",
        name="gelu forward",
        device="cpu",
        entries=tuple(Entry(*name.split()) for name in seconds),
        start=lambda: ready,
        work=lambda entry: work,
        sizes={"tokens": 3},
        **more,
    )


def test_a_wrong_competitor_has_no_speed_and_the_others_have():
    found = run(comparison({"pytorch fp32": [1.0, 1.0], "mine fp32": [], "cpp fp32": [0.5, 0.5]}), TWO)
    pytorch, mine, cpp = (measured.record for measured in found)
    assert mine.problem == "wrong, so not timed: by far" and mine.seconds is None and mine.versus == ()
    assert pytorch.seconds.median == 1.0 and cpp.seconds.median == 0.5
    assert [len(measured.rounds) for measured in found] == [2, 0, 2]


def test_whatever_a_competitor_raises_is_its_problem():
    def start():
        def ready(entry):
            raise KeyError("no\nsuch")

        return ready

    sound = comparison({"mine fp32": [1.0]})
    ((record, _),) = [(m.record, m.rounds) for m in run(Comparison(**{**vars(sound), "start": start}), TWO)]
    assert record.problem == "KeyError: 'no\\nsuch'"


def test_ratios_are_of_rounds_against_the_baseline_in_its_precision_or_fp32():
    seconds = {"pytorch fp32": [2.0, 8.0], "pytorch bf16": [1.0, 1.0], "cpp bf16": [0.5, 0.25], "cpp int8": [1.0, 2.0]}
    records = {f"{m.record.backend} {m.record.precision}": m.record for m in run(comparison(seconds), TWO)}
    assert records["pytorch bf16"].versus == ()
    ((bf16,), (int8,)) = records["cpp bf16"].versus, records["cpp int8"].versus
    assert (bf16.competitor, bf16.ratio.low, bf16.ratio.high) == ("pytorch bf16", 2.0, 4.0)
    assert (int8.competitor, int8.ratio.low, int8.ratio.high) == ("pytorch fp32", 2.0, 4.0)


@pytest.mark.parametrize(
    "work, limit, share",
    [
        (Work(read=20e9), "read", 1.0),  # 2 s at 10 GB/s
        (Work(read=5e9, written=2e9), "copy", 0.7),
        (Work(read=1e9, operations=100e9), "fp32", 0.5),
        (Work(read=1e9, operations=100e9, arithmetic="bf16"), None, None),  # no such instruction
        (Work(read=20e9, in_cache=True, operations=100e9), "fp32", 0.5),
        (Work(tokens=3), None, None),
    ],
)
def test_a_share_is_of_the_limit_that_binds(work, limit, share):
    ((record),) = [m.record for m in run(comparison({"cpp fp32": [2.0, 2.0]}, work), TWO, [LIMITS])]
    assert record.limit == limit
    assert record.share_of_limit == (None if share is None else pytest.approx(share))


def test_rates_are_of_the_median():
    work = Work(tokens=100, read=3e9, written=1e9, operations=8e9, text=2_000_000)
    (measured,) = run(comparison({"cpp fp32": [2.0, 2.0]}, work), TWO)
    assert measured.record.rates == {
        "tokens_per_second": 50.0,
        "megabytes_per_second": 1.0,
        "gigabytes_per_second": 2.0,
        "gigaflops_per_second": 4.0,
    }
    assert measured.record.checked == 0.5 and measured.record.share_of_limit is None
