"""Files to documents, as a stream: a corpus may be larger than memory.

- `.txt`, `.md`, or any other file that is named itself: what stands between `<|endoftext|>`, or the whole file
- `.jsonl`: a line each, `{"text": …}`, or `{"prompt": …, "completion": …}`, whose prompt is no target
- a `.zip` or a folder: the files of these kinds within, in the order of their names
"""

from __future__ import annotations

import codecs
import io
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from llmfast.tokenizers.protocol import END_OF_TEXT, encodable

TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".zip")  # what is taken from a folder
BLOCK = 1 << 20  # bytes read at once
PART = 1 << 20  # characters of a document handled at once


@dataclass(frozen=True)
class Part:
    """A document, or a piece of a long one; the `prompt` before it is to be seen, not to be learned."""

    text: str
    prompt: str = ""
    ends: bool = True  # whether the document ends here


@dataclass(frozen=True)
class Source:
    """A file of documents: on its own, or a member of a zip."""

    path: Path
    member: str | None
    size: int  # bytes, unpacked
    encoding: str = "utf-8"  # of a text; JSON is always UTF-8

    @property
    def name(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}/{self.member}"

    def parts(self) -> Iterator[Part]:
        """The documents, blank ones left out. `ValueError` names the file and the place of what can't be read."""
        try:
            if self.member is None:
                with open(self.path, "rb") as file:
                    yield from self._parts(file)
            else:
                with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
                    yield from self._parts(file)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            # RuntimeError is what zipfile raises for a member that is encrypted.
            raise ValueError(f"{self.name} can't be unpacked: {error}") from None

    def _parts(self, file: IO[bytes]) -> Iterator[Part]:
        if self.name.endswith(".jsonl"):
            yield from _records(_decoded(file, self.name, "utf-8"), self.name)
        else:
            yield from _between_separators(_decoded(file, self.name, self.encoding))


def find_sources(paths: Iterable[str | Path], encoding: str = "utf-8") -> list[Source]:
    """The files that `paths` lead to: those of a folder or a zip in the order of their names.

    `FileNotFoundError` for a path that leads nowhere, `ValueError` for one without any text.
    """
    try:
        codecs.lookup(encoding)
    except LookupError:
        raise ValueError(f"encoding {encoding!r} is not known; try utf-8, latin-1 or utf-16") from None
    sources: list[Source] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"no file or folder {path}")
        found = [source for file in _files(path) for source in _sources(file, encoding)]
        if not found:
            raise ValueError(f"{path} holds no {', '.join(SUFFIXES)}")
        sources += found
    if not sources:
        raise ValueError("no files were given")
    return sources


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    names = [file.relative_to(path) for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file()]
    return [path / name for name in sorted(names) if not _hidden(name.parts)]


def _sources(path: Path, encoding: str) -> list[Source]:
    if path.suffix != ".zip":
        return [Source(path, None, path.stat().st_size, encoding)]
    try:
        with zipfile.ZipFile(path) as archive:
            members = sorted(archive.infolist(), key=lambda member: member.filename)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} can't be unpacked: {error}") from None
    kinds = (*TEXT_SUFFIXES, ".jsonl")
    wanted = [m for m in members if m.filename.endswith(kinds) and not _hidden(m.filename.split("/"))]
    return [Source(path, member.filename, member.file_size, encoding) for member in wanted]


def _hidden(parts: Iterable[str]) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _decoded(file: IO[bytes], name: str, encoding: str) -> Iterator[str]:
    """Bytes as text, without a byte order mark, and with every line end a `\\n`."""
    decoder = codecs.getincrementaldecoder(encoding)()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    read = 0
    while True:
        block = file.read(BLOCK)
        pending = len(decoder.getstate()[0])  # bytes of a character that the last block began
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name} is not {encoding}: byte {read - pending + error.start} ({error.object[error.start]:#04x}) "
                "begins no character; a text in another encoding is read with `--encoding latin-1` (by `llmfast train` "
                "with `--set encoding=latin-1`)"
            ) from None
        if read == 0:
            text = text.removeprefix("\ufeff")
        read += len(block)
        if text := newlines.decode(text, final=not block):
            yield text
        if not block:
            return


def _between_separators(blocks: Iterable[str]) -> Iterator[Part]:
    """Splits at `<|endoftext|>`, and leaves out the blank around it."""
    text = ""  # of the document that is being read, what was not yet given on
    begun = False  # whether some of it was
    separated = False  # whether a separator came before it
    for block in blocks:
        *ended, text = (text + block).split(END_OF_TEXT)
        for document in ended:
            document = document.rstrip() if begun or not separated else document.strip()
            if document or begun:
                yield Part(document)
            begun, separated = False, True
        if separated and not begun:
            text = text.lstrip()
        while len(text) > PART:
            end = _cut(text)
            yield Part(text[:end], ends=False)
            text, begun = text[end:], True
    if begun or text.strip():
        yield Part(text)


def _cut(text: str) -> int:
    """Where to end the first part of a long text: late, but short of a separator that may begin at its end.

    A line break between two characters that are not blank is best: every tokenizer here splits there anyway, so that
    the tokens are those of the whole text. Where there is none a space must do, and at worst any place.
    """
    limit = min(PART, len(text) - len(END_OF_TEXT))
    end = limit
    while (end := text.rfind("\n", PART // 2, end)) > 0:
        if not text[end - 1].isspace() and not text[end + 1].isspace():
            return end + 1
    space = text.rfind(" ", PART // 2, limit)
    return space if space > 0 else limit


def _records(blocks: Iterable[str], name: str) -> Iterator[Part]:
    for number, line in enumerate(_lines(blocks), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}, line {number}: not valid JSON: {error}") from None
        if not isinstance(record, dict):
            record = {}
        if isinstance(record.get("text"), str):
            part = Part(encodable(record["text"]))
        elif isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
            part = Part(encodable(record["completion"]), encodable(record["prompt"]))
        else:
            raise ValueError(f'{name}, line {number}: needs a string "text", or "prompt" and "completion"')
        if part.text.strip():
            yield part


def _lines(blocks: Iterable[str]) -> Iterator[str]:
    rest: list[str] = []
    for block in blocks:
        first, *lines = block.split("\n")
        rest.append(first)
        if lines:
            yield "".join(rest)
            yield from lines[:-1]
            rest = [lines[-1]]
    yield "".join(rest)
