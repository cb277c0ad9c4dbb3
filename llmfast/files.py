"""Writing files so that a crash never leaves half of one, and one process at a time."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomic(path: str | Path, content: bytes | Callable[[str], object]) -> None:
    """Writes `content` (bytes, or a function that writes the file it is given) to `path`, whole or not at all.

    The bytes go to a temporary file in the same folder, reach the disk, and are then renamed over `path`.
    """
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    try:
        if callable(content):
            content(temporary)
        else:
            Path(temporary).write_bytes(content)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are private; ordinary files are not
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def file_sha256(path: Path, progress: Callable[[int], None] = lambda read: None) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


class Locked(RuntimeError):
    """Another process holds a lock; the text says which."""


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Holds the lock file `path`, which the system frees when this process ends, however it ends.

    `Locked` where another process holds it. Where the system or the file system has no such locks, nothing is held.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Locked(f"process {file.read().strip() or 'unknown'}") from None
        except OSError:
            yield
            return
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
