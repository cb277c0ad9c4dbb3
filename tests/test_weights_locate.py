"""Names of models: embedded, on disk, on the hub, or a clear error."""

import sys
import types

import pytest

from llmfast.weights.locate import locate_model


@pytest.fixture
def no_hub(monkeypatch):
    """As if huggingface_hub were not installed."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)


@pytest.fixture
def hub(monkeypatch):
    """A hub that records what it is asked for, and gives or raises what the test sets."""
    state = types.SimpleNamespace(asked=[], answer="/nowhere")

    def snapshot_download(name, **settings):
        state.asked.append((name, settings))
        if isinstance(state.answer, Exception):
            raise state.answer
        return state.answer

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    return state


def test_an_existing_path_is_itself(tmp_path, no_hub):
    file = tmp_path / "model.safetensors"
    file.touch()
    assert locate_model(tmp_path) == tmp_path
    assert locate_model(str(file)) == file


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch, no_hub):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert locate_model("~/model") == tmp_path / "model"


def test_stories_is_the_model_inside_the_package():
    import llmfast

    path = locate_model("stories")
    assert path.name == "stories" and path.is_relative_to(llmfast.__path__[0])


@pytest.mark.parametrize("name", ["./here", "/no/such/place", "a/b/c", "~/nothing", "model.safetensors", "x/y.bin"])
def test_what_can_only_be_a_path_is_not_looked_for_on_the_hub(name, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model at"):
        locate_model(name)
    assert hub.asked == []


def test_a_missing_path_object_is_not_looked_for_on_the_hub(hub, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model at"):
        locate_model(tmp_path / "gone")
    assert hub.asked == []


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_a_hub_name_is_downloaded(name, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub.answer = str(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert locate_model(name) == tmp_path
    assert [asked for asked, _ in hub.asked] == [name]


def test_old_weights_are_fetched_only_where_there_are_no_others(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub.answer = str(tmp_path)
    locate_model("gpt2")
    assert [asked for asked, _ in hub.asked] == ["gpt2", "gpt2"]


def test_a_local_directory_is_preferred_to_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert locate_model("gpt2").resolve() == tmp_path / "gpt2"
    assert hub.asked == []


def test_without_huggingface_hub_the_error_says_so(no_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="'gpt2'.*stories.*huggingface_hub is not installed") as error:
        locate_model("gpt2")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("failure", [OSError("no route\nto host " + "x" * 999), ValueError(), RuntimeError("403")])
def test_a_hub_that_fails_is_one_line_with_the_reason(failure, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub.answer = failure
    reason = str(failure).split("\n")[0] or "ValueError"
    with pytest.raises(FileNotFoundError, match=f"hub did not give it: {reason}") as error:
        locate_model("no-such-model")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
