"""The page of a run and its pictures: what is in them, that nothing is hidden, and that nothing else is needed."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfast.benchmarking import drawing, page, panels, plots
from llmfast.benchmarking.records import Record, Results, Spread, Versus

pytest.importorskip("matplotlib")

FACTS = {
    "command": "llmfast bench all <quick>",
    "date": "2026-01-02T03:04:05Z",
    "commit": "0123456789abcdef",
    "dirty": True,
    "machine": {"cpu": "A & B 9000", "cores": 2, "gpu": None, "system": "Linux"},
    "isa": "avx2",
    "threads": 2,
    "versions": {"llmfast": "0.1.0", "torch": "2.13.0"},
}
RATES = {"1": {"median": 10.0, "best": 11.0}, "2": {"median": 20.0, "best": 21.5}}
LIMITS = {"isa": "avx2", "threads": 2, "read": RATES, "copy": RATES, "fp32": RATES, "int8": None}


def record(group: str, name: str, backend: str = "cpp", precision: str = "fp32", ms: float = 2.0, **rest) -> Record:
    sizes = rest.pop("sizes", {"tokens": 64})
    if "bytes" not in rest and "problem" not in rest:
        rest["seconds"] = Spread(ms / 1000, ms / 1100, ms / 900, 5)
    return Record(group, name, backend, precision, "cpu", sizes, **rest)


def op(T: int, backend: str, ratio: float | None = None) -> Record:
    rates = {"gigabytes_per_second": T / 50, "gigaflops_per_second": T / 10}
    versus = () if ratio is None else (Versus("pytorch fp32", Spread(ratio, 0.9 * ratio, 1.2 * ratio, 5)),)
    share = {"limit": "copy", "share_of_limit": 0.4}
    return record("ops", "layer_norm forward", backend, sizes={"tokens": T}, rates=rates, versus=versus, **share)


def some_results() -> Results:
    rates = {"tokens_per_second": 100.0}
    found = [op(T, backend, ratio) for T in (64, 128) for backend, ratio in (("pytorch", None), ("cpp", T / 80))]
    found += [record("ops", "gelu backward", "theirs", problem="wrong, so not timed: <nan>")]
    found += [
        record("decode", "decode", precision=p, sizes={"batch": B, "context": S}, model="gpt2", rates=rates)
        for p in ("fp32", "int8")
        for B, S in ((1, 32), (1, 256), (4, 32))
    ]
    found += [
        record("generate", f"generate, {cached}", ms=T, sizes={"tokens": T}, model="stories", rates=rates)
        for T in (16, 64)
        for cached in ("cached", "uncached")
    ]
    found += [record("memory", "prefill", sizes={"tokens": T}, model="gpt2", bytes=T << 20) for T in (64, 512)]
    found += [record("memory", "decode", sizes={"context": 32}, model="gpt2", bytes=5 << 20)]
    found += [record("latency", "load", model="stories", sizes={})]
    for library, precision in (("llmfast", "int8"), ("llama.cpp", "q8_0")):
        bounded = {"share_of_limit": 0.5, "limit": "read"}
        sizes = {"batch": 1, "context": 32}
        found.append(record("peers", "decode", library, precision, sizes=sizes, model="gpt2", rates=rates, **bounded))
    return Results(FACTS, LIMITS, tuple(found))


RESULTS = some_results()


class Elements(HTMLParser):
    """Every start tag with its attributes; fails where an end tag closes something else."""

    VOID = {"meta", "br", "path", "use"}

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "out"
    return folder, page.write(RESULTS, folder).read_text(encoding="utf-8")


def test_the_page_needs_nothing_but_itself(written):
    _, page = written
    elements = Elements(page).found
    tags = {tag for tag, _ in elements}
    assert not tags & {"script", "link", "img", "iframe"}
    for _, attributes in elements:
        for name in ("href", "src", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#"), attributes
    assert not re.search(r"url\((?!#)|@import", page)


def test_the_page_says_where_it_was_measured_and_what_the_limits_are(written):
    _, page = written
    for text in (
        "A &amp; B 9000",
        "avx2",
        "torch 2.13.0",
        "0123456789ab with changes",
        "bench all &lt;quick&gt;",
        "22 GB/s",
    ):
        assert text in page, text


def test_losses_stand_on_top_and_everything_unmeasured_is_named(written):
    _, page = written
    top, _, groups = page.partition('<h2 id="ops">')
    assert "Of 2 comparisons 1 are faster than the competitor, 1 slower, and 0 as fast" in top
    assert "0.80 ×" in top and "pytorch fp32" in top
    assert "wrong, so not timed: &lt;nan&gt;" in top and "wrong, so not timed: &lt;nan&gt;" in groups
    assert '<span class="won">1.60 × pytorch fp32</span>' in groups


def test_every_picture_is_in_the_page_and_a_file(written):
    folder, page = written
    names = set(plots.plots(RESULTS))
    expected = {"overview", "roofline", "ops-layer_norm", "decode-gpt2", "generate-stories", "memory", "memory-weights"}
    assert names == expected | {"latency", "peers"}
    assert {file.stem for file in folder.glob("*.png")} == names
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in folder.glob("*.png"))
    assert set(re.findall(r'aria-label="(.*?)"', page)) == names


def test_the_pictures_of_the_page_take_its_colours(written):
    _, page = written
    svgs = "".join(re.findall(r"<svg.*?</svg>", page, re.S))
    assert "var(--series0)" in svgs
    assert not [color for color in drawing.LIGHT.values() if color in svgs]
    assert "prefers-color-scheme:dark" in page and drawing.DARK["series0"] in page


def test_one_picture_to_a_file(tmp_path):
    for name in ("peers.png", "peers.svg"):
        plots.draw(RESULTS, "peers", tmp_path / name, dark=True)
        assert (tmp_path / name).stat().st_size > 1000
    assert drawing.DARK["series0"] in (tmp_path / "peers.svg").read_text()
    with pytest.raises(ValueError, match="no picture 'sunset'; they give overview"):
        plots.draw(RESULTS, "sunset", tmp_path / "sunset.png")


def test_a_panel_varies_one_size_and_leaves_the_others_at_their_least():
    decode = [r for r in RESULTS.of("decode") if r.precision == "fp32"]
    assert [r.sizes["context"] for r in panels.varying(decode, "context")] == [32, 256]
    assert [r.sizes["batch"] for r in panels.varying(decode, "context")] == [1, 1]
    assert [r.sizes for r in panels.varying(decode, "batch")] == [{"batch": b, "context": 32} for b in (1, 4)]
    assert panels.varying(decode, "tokens") == []


def test_throughput_stands_beside_what_the_limit_allows():
    ops = [r for r in RESULTS.of("ops") if r.seconds]
    (panel,) = panels.line_panels(ops)
    assert panel.y == "GB/s"
    assert [line.name for line in panel.lines] == ["pytorch", "cpp"]
    x, y, low, high = panel.lines[1].points[0]
    assert (x, y) == (64, pytest.approx(1.28)) and low < y < high
    assert panel.limit == ((64, pytest.approx(3.2)), (128, pytest.approx(6.4)))


def test_bars_stand_where_no_size_changes():
    (bars,) = panels.bar_panels(RESULTS.of("peers"), "tokens_per_second")
    assert bars.title == "decode, 32 tokens before"
    assert [(bar.name, bar.value, bar.limit) for bar in bars.bars] == [
        ("llmfast int8", 100.0, 200.0),
        ("llama.cpp q8_0", 100.0, 200.0),
    ]


def test_results_without_limits_or_with_nothing(tmp_path):
    html = page.write(Results({}, {}, (op(64, "cpp"),)), tmp_path).read_text()
    assert "limits were not measured" in html
    Elements(html)
    with pytest.raises(ValueError, match="no results"):
        page.write(Results({}, {}, ()), tmp_path)


def test_without_matplotlib_there_is_a_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'llmfast-kernels\[bench\]'"):
        page.write(RESULTS, tmp_path)


def test_competitors_keep_their_colours_and_share_none():
    assert drawing.series_of(["cpp", "pytorch"])["cpp"] == drawing.series_of(["theirs", "cpp"])["cpp"]
    numbers = drawing.series_of(["cpp", "pytorch", "theirs", "others"])
    assert len(set(numbers.values())) == 4
    for theme in (drawing.LIGHT, drawing.DARK):
        assert len(set(theme.values())) == len(theme)
        for name in ("ink", "muted", "series0", "series1", "series2", "series3", "series4"):
            assert contrast(theme[name], theme["paper"]) >= 4.5, name


def contrast(first: str, second: str) -> float:
    """The ratio of luminances that WCAG 2 defines."""

    def luminance(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_names_at_line_ends_never_overlap(heights):
    placed = drawing.apart(heights, 0.1)
    ordered = sorted(placed)
    assert all(b - a >= 0.1 - 1e-9 for a, b in zip(ordered, ordered[1:], strict=False))
    assert all(-1e-9 <= height <= 1.05 + 1e-9 for height in placed)
    for i, a in enumerate(heights):  # nobody changes places
        assert all(placed[i] < placed[j] for j, b in enumerate(heights) if a < b)
