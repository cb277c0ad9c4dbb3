"""Configurations: presets, files and single settings, and what is wrong with them in one line."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfast.training.configuration import (
    PRESETS,
    OptimizationSettings,
    TrainingConfig,
    configure,
)
from llmfast.training.schedules import learning_rate
from llmfast.training.settings import tomllib


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_being_printed_and_read(name, tmp_path):
    config = TrainingConfig.preset(name)
    (tmp_path / "run.toml").write_text(config.to_toml(), "utf-8")
    assert configure(file=tmp_path / "run.toml") == config
    assert TrainingConfig.from_document(config.to_document()) == config


def test_the_presets_asked_for_are_there():
    assert set(PRESETS) == {"shakespeare-char", "shakespeare-char-cpu", "stories", "llama-small", "gpt2"}
    cpu = TrainingConfig.preset("shakespeare-char-cpu")
    assert (cpu.model.n_layer, cpu.model.n_head, cpu.model.n_embd, cpu.model.n_positions) == (4, 4, 128, 64)
    assert (cpu.data.batch_size, cpu.run.steps, cpu.model.dropout) == (12, 2000, 0.0)


def test_every_key_belongs_to_one_section():
    sections = [getattr(TrainingConfig(), name) for name in TrainingConfig.sections()]
    names = [each.name for section in sections for each in dataclasses.fields(section)]
    assert len(names) == len(set(names)) == len(TrainingConfig.settings())


def test_single_settings_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    (tmp_path / "run.toml").write_text('preset = "gpt2"\nsteps = 7\n[optimization]\nlr = 1\n', "utf-8")
    config = configure(file=tmp_path / "run.toml", changes={"optimization.lr": "0.5", "compile": "true"})
    assert (config.run.steps, config.optimization.lr, config.run.compile, config.model.n_layer) == (7, 0.5, True, 12)
    assert configure("stories", tmp_path / "run.toml").model.n_layer == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 3}, "unknown setting 'n_layers'; did you mean 'n_layer'?"),
        ({"modle.n_layer": 3}, "unknown section 'modle'; did you mean 'model'?"),
        ({"run.lr": 3}, "unknown setting 'run.lr': lr belongs to optimization"),
        ({"data.xyzzy": 3}, "unknown setting 'data.xyzzy'; known: encoding, tokenizer"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": "many"}, "steps must be a whole number, got 'many'"),
        ({"steps": 1.5}, "steps must be a whole number, got 1.5"),
        ({"steps": True}, "steps must be a whole number, got True"),
        ({"dropout": 1}, "dropout must be at least 0 and below 1, got 1"),
        ({"lr": "nan"}, "lr must be a number, got nan"),
        ({"lr": float("inf")}, "lr must be above 0, got inf"),
        ({"compile": "maybe"}, "compile must be true or false, got 'maybe'"),
        ({"optimizer": "adam"}, "optimizer must be adamw, sgd, muon, got 'adam'; did you mean 'adamw'?"),
        ({"n_head": 5}, "n_head must divide n_embd, but 5 does not divide 192"),
    ],
)
def test_a_wrong_setting_is_named(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        configure(changes=changes)


def test_a_file_that_is_no_configuration_is_named(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("lr = = 3")
    with pytest.raises(ValueError, match=r"run.toml is not TOML"):
        configure(file=path)
    path.write_text("[optimization]\nlearning_rate = 3")
    with pytest.raises(ValueError, match=r"run.toml: unknown setting 'optimization.learning_rate'"):
        configure(file=path)
    with pytest.raises(ValueError, match="unknown preset 'gpt3'; did you mean 'gpt2'"):
        configure("gpt3")
    with pytest.raises(FileNotFoundError):
        configure(file=tmp_path / "nowhere.toml")


@given(st.text(max_size=20))
def test_any_text_comes_back_from_the_file(text):
    text = text.encode("utf-8", "ignore").decode()
    config = configure(changes={"sample_prompt": text})
    assert TrainingConfig.from_document(tomllib.loads(config.to_toml())) == config


# --- the schedule -------------------------------------------------------------------------------------------------


def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_end():
    def rates(schedule, **changes):
        settings = OptimizationSettings(lr=2.0, warmup=4, schedule=schedule, **changes)
        return [learning_rate(step, 24, settings) for step in range(24)]

    held = rates("linear", hold=0.5)
    assert held[4:15] == pytest.approx([2.0] * 11) and held[15:] == pytest.approx([1.8 - 0.2 * i for i in range(9)])
    for schedule in ("cosine", "linear", "constant"):
        assert rates(schedule)[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates("linear")[14] == pytest.approx(1.0) and rates("cosine")[14] == pytest.approx(1.0)
    assert rates("linear")[23] == pytest.approx(0.1) and 0 < rates("cosine")[23] < 0.1
    assert rates("constant")[4:] == [2.0] * 20
    assert min(rates("cosine", final_lr=0.25)[4:]) > 0.5


@given(st.sampled_from(["cosine", "linear", "constant"]), st.integers(0, 50), st.integers(1, 60), st.floats(0, 1))
def test_the_learning_rate_is_always_between_its_bounds(schedule, warmup, steps, final):
    settings = OptimizationSettings(lr=1.0, warmup=warmup, schedule=schedule, final_lr=final)
    rates = [learning_rate(step, steps, settings) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    falling = rates[warmup:]
    assert all(a >= b for a, b in zip(falling, falling[1:], strict=False))
    assert all(rate >= final for rate in falling)
