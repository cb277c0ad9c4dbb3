"""write_atomic: whole or not at all."""

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfast.files import write_atomic


@settings(max_examples=20)
@given(content=st.binary(max_size=1000), before=st.none() | st.binary(max_size=100))
def test_bytes_arrive_whole_and_replace_what_was_there(tmp_path_factory, content, before):
    path = tmp_path_factory.mktemp("files") / "data.bin"
    if before is not None:
        path.write_bytes(before)
    write_atomic(path, content)
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_a_function_writes_the_file_it_is_given(tmp_path):
    write_atomic(str(tmp_path / "a.txt"), lambda name: Path(name).write_text("hello"))
    assert (tmp_path / "a.txt").read_text() == "hello"


class Crash(BaseException):
    """Not an Exception: what an interrupt is like."""


@pytest.mark.parametrize("kind", [OSError, Crash])
@pytest.mark.parametrize("existed", [True, False])
def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path, kind, existed):
    path = tmp_path / "model.safetensors"
    if existed:
        path.write_bytes(b"old")

    def half(name):
        Path(name).write_bytes(b"half of the n")
        raise kind("the disk is full")

    with pytest.raises(kind):
        write_atomic(path, half)
    assert [p.name for p in tmp_path.iterdir()] == (["model.safetensors"] if existed else [])
    assert not existed or path.read_bytes() == b"old"


def test_a_rename_that_fails_leaves_no_temporary(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        write_atomic(tmp_path / "taken", b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "nowhere" / "file", b"x")


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX's")
@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_file_gets_the_permissions_of_an_ordinary_one(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_atomic(tmp_path / "file", b"x")
        assert os.umask(mask) == mask  # asking for the mask does not change it
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
