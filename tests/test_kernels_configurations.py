"""Configurations as data: complete tables, clear errors, and what a search finds."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")

import llmfast
from llmfast.kernels import configurations, launch, tuning
from llmfast.kernels.attention_decoding import DecodingTile
from llmfast.kernels.attention_forward import ForwardTile
from llmfast.kernels.attention_tiles import AttentionTile
from llmfast.kernels.configurations import FAMILIES, configuration, using
from llmfast.kernels.gelu import ElementwiseTile, gelu
from llmfast.kernels.matmul import MatrixTile
from llmfast.kernels.norm_rows import PersistentRowsTile, RowsTile

KINDS = {
    "attention_forward": ForwardTile,
    "attention_decoding": DecodingTile,
    "attention_delta": AttentionTile,
    "attention_query_gradient": AttentionTile,
    "attention_key_gradient": AttentionTile,
    "layer_norm_forward": RowsTile,
    "layer_norm_backward": PersistentRowsTile,
    "rms_norm_forward": RowsTile,
    "rms_norm_backward": PersistentRowsTile,
    "gelu": ElementwiseTile,
    "rotary": ElementwiseTile,
    "gated_linear": MatrixTile,
    "matrix_multiply": MatrixTile,
    "quantized_linear": MatrixTile,
    "cross_entropy_forward": MatrixTile,
    "cross_entropy_backward": MatrixTile,
}


@dataclass(frozen=True)
class Tile:
    rows: int
    warps: int = 4


@pytest.fixture
def family(tmp_path, monkeypatch):
    """Writes the file of a family that only this test knows."""
    monkeypatch.setattr(configurations, "FOLDER", tmp_path)
    monkeypatch.setattr(configurations, "FAMILIES", ("test",))
    configurations._read.cache_clear()
    configurations._find.cache_clear()

    def write(content: object) -> str:
        (tmp_path / "test.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return "test"

    yield write
    configurations._read.cache_clear()
    configurations._find.cache_clear()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_every_table_with_the_same_keys(family):
    for kernel, kind in KINDS.items():
        keys = set(configurations.configurations(kernel, kind, family))
        assert keys == set(configurations.configurations(kernel, kind, "default")), kernel
    assert set(configurations._read(family)) == set(KINDS)


@pytest.mark.parametrize("family", FAMILIES)
def test_tiles_are_powers_of_two_as_triton_wants_them(family):
    for kernel, kind in KINDS.items():
        for tile in configurations.configurations(kernel, kind, family).values():
            numbers = ("stages", "descriptors", "programs", "registers")
            sizes = [value for name, value in vars(tile).items() if name not in numbers]
            assert all(size > 0 and size & (size - 1) == 0 for size in sizes), (kernel, tile)


def test_a_line_is_found_by_its_key_and_defaults_need_not_be_written(family):
    name = family({"norm": [{"columns": 64, "rows": 2}, {"columns": 128, "rows": 8, "warps": 1}]})
    assert configuration("norm", Tile, name, columns=64) == Tile(2, 4)
    assert configuration("norm", Tile, name, columns=128) == Tile(8, 1)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"norm": [{"columns": 64, "rows": 2}]}, "no line for columns 32; there are columns 64"),
        ({"other": []}, "has no table 'norm'; it has other"),
        ({"norm": [{"columns": 32, "warps": 2}]}, "lacks rows"),
        ({"norm": [{"columns": 32, "rows": 1}, {"columns": 32, "rows": 2}]}, "two lines for columns 32"),
        ("{", "test.json can't be read"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(family, content, message):
    with pytest.raises(ValueError, match=message):
        configuration("norm", Tile, family(content), columns=32)


def test_an_unknown_family_is_named():
    with pytest.raises(ValueError, match="unknown GPU family 'volta'"):
        configuration("gelu", ElementwiseTile, "volta")


def test_using_forces_a_tile_and_lets_go_of_it_after_an_error():
    before = configuration("gelu", ElementwiseTile, "default")
    with pytest.raises(RuntimeError), using("gelu", ElementwiseTile(64, 1)):
        assert configuration("gelu", ElementwiseTile, "default") == ElementwiseTile(64, 1)
        raise RuntimeError
    assert configuration("gelu", ElementwiseTile, "default") == before


def test_a_line_may_say_how_many_registers_a_thread_may_have(monkeypatch):
    tile = AttentionTile(16, 32, 8, 2, registers=255)
    assert launch.scheduled(tile) == {"num_warps": 8, "num_stages": 2, "maxnreg": 255}
    assert launch.scheduled(AttentionTile(16, 32, 8, 2)) == {"num_warps": 8, "num_stages": 2}
    assert launch.scheduled(RowsTile(4, 2)) == {"num_warps": 2}
    assert configuration("rms_norm_backward", PersistentRowsTile, "default", columns=2048).registers == 255
    monkeypatch.setattr(torch.version, "hip", "7.0")  # whose compiler knows no such option
    assert launch.scheduled(tile) == {"num_warps": 8, "num_stages": 2}


def test_a_search_times_every_candidate_once_and_prints_the_line_to_commit(monkeypatch, capsys):
    monkeypatch.setattr(tuning, "AUTOTUNE", True)
    monkeypatch.setattr(tuning, "_found", {})
    cost = {8: 3.0, 16: 1.0, 32: 2.0}
    timed: list[int] = []
    monkeypatch.setattr(tuning, "_milliseconds", lambda run: cost[run()])

    def launch(tile: Tile) -> int:
        timed.append(tile.rows)
        return tile.rows

    x = torch.empty(3)
    with using("norm", Tile(8)):
        chosen = [tuning.choose("norm", Tile, x, [Tile(16), Tile(32)], launch, columns=64) for _ in range(3)]
    assert chosen == [Tile(16)] * 3 and timed == [8, 16, 32]
    printed = capsys.readouterr().err
    assert "configs/default.json, norm" in printed
    line = json.loads(printed.splitlines()[-1])
    assert line == {"columns": 64, "rows": 16}


def test_a_real_kernel_can_be_searched(monkeypatch, capsys):
    monkeypatch.setattr(tuning, "AUTOTUNE", True)
    monkeypatch.setattr(tuning, "_found", {})
    x = torch.randn(1000)
    torch.testing.assert_close(gelu(x, "tanh"), torch.nn.functional.gelu(x, approximate="tanh"))
    assert '{"block": ' in capsys.readouterr().err


def test_explain_names_the_kernel_and_its_configuration():
    q = torch.randn(1, 2, 40, 64)
    with llmfast.use_backend("triton"):
        prefill = llmfast.explain("causal_attention", q, q, q).configuration
        step = llmfast.explain("causal_attention", q[:, :, :1], q, q).configuration
        with launch.pretend(launch.Device("hopper", 132)):
            hopper = llmfast.explain("causal_attention", q, q, q).configuration
    tile = configuration("attention_forward", ForwardTile, "default", element_bytes=4, head_dim=64, heavy=False)
    assert "attention_forward" in prefill and f"query_block {tile.query_block}" in prefill and "(default)" in prefill
    assert "attention_decoding" in step and "(hopper)" in hopper
