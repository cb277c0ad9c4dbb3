"""Files to documents, as a stream: a corpus may be larger than memory.

- `.txt`, `.md`, or any other file that is named itself: what stands between `<|endoftext|>`, or the whole file
- `.jsonl`: a line each, `{"text": …}`, or `{"prompt": …, "completion": …}`, whose prompt is no target
- a `.zip` or a folder: the files of these kinds within, in the order of their names

Training, tokenizers and evaluation all read text here, so that a file is the same text, and the same tokens, to each:
without a byte order mark (one of UTF-16 or UTF-32 says how to read the rest), and with every line end a `\n`.
"""

from __future__ import annotations

import codecs
import io
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llmfast.tokenizers.protocol import END_OF_TEXT, encodable

TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".zip")  # what is taken from a folder
BLOCK = 1 << 20  # bytes read at once
PART = 1 << 20  # characters of a document handled at once
LONGEST_LINE = 1 << 24  # characters of a line of JSON, which is in memory as a whole
# A zip's member may be this many times its packed size, or this many bytes: deflate reaches 1000 times with repetition
# alone, and text takes a fifth to a half.
UNPACKED_TIMES, UNPACKED_BYTES = 200, 1 << 27
MARKS = {  # UTF-32 first: its mark begins as that of UTF-16 does
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
NULS = 1 / 64  # the share of NUL characters above which something is not the text that it was read as


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
        if self.name.endswith(".jsonl"):
            for number, record in self.records():
                if (part := _part(record, f"{self.name}, line {number}")).text.strip():
                    yield part
        else:
            with self.opened() as file:
                yield from _between_separators(_decoded(file, self.name, self.encoding))

    def records(self) -> Iterator[tuple[int, Any]]:
        """The number of each line that is not blank, from 1, and the JSON in it."""
        with self.opened() as file:
            for number, line in enumerate(_lines(_decoded(file, self.name, "utf-8"), self.name), start=1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise ValueError(f"{self.name}, line {number}: not valid JSON: {error}") from None

    @contextmanager
    def opened(self) -> Iterator[IO[bytes]]:
        try:
            if self.member is None:
                with open(self.path, "rb") as file:
                    yield file
            else:
                with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
                    yield file
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            # RuntimeError is what zipfile raises for a member that is encrypted.
            raise ValueError(f"{self.name} can't be unpacked: {error}") from None


def find_sources(
    paths: Iterable[str | Path], encoding: str = "utf-8", suffixes: tuple[str, ...] = SUFFIXES
) -> list[Source]:
    """The files that `paths` lead to: those of a folder or a zip that have one of the suffixes, in the order of their
    names.

    `FileNotFoundError` for a path that leads nowhere, `ValueError` for one without any text, or a zip that unpacks to
    more than text does.
    """
    _check_encoding(encoding)
    sources: list[Source] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"no file or folder {path}")
        found = [source for file in files_in(path, suffixes) for source in _sources(file, encoding, suffixes)]
        if not found:
            raise ValueError(f"{path} holds no {', '.join(suffixes)}")
        sources += found
    if not sources:
        raise ValueError("no files were given")
    return sources


def read_text(path: str | Path, encoding: str = "utf-8") -> str:
    """All of a text file, separators and blanks included. `FileNotFoundError`, or `ValueError` naming the place."""
    _check_encoding(encoding)
    source = Source(Path(path), None, 0, encoding)
    with source.opened() as file:
        return "".join(_decoded(file, source.name, encoding))


def decode_text(data: bytes, name: str, encoding: str = "utf-8") -> str:
    """The text in the bytes of a file, as `read_text` reads it."""
    _check_encoding(encoding)
    return "".join(_decoded(io.BytesIO(data), name, encoding))


def split_documents(text: str) -> list[str]:
    """The documents of a text, as training finds them."""
    documents = [""]
    for part in _between_separators([text]):
        documents[-1] += part.text
        if part.ends:
            documents.append("")
    return documents[:-1]


def _check_encoding(name: str) -> None:
    try:
        "".encode(name)  # which knows an encoding of text from a cipher such as rot13
        codecs.getincrementaldecoder(name)()
    except (LookupError, ValueError):
        raise ValueError(f"encoding {name!r} is not known; try utf-8, latin-1 or utf-16") from None


def files_in(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Those of a folder that have one of the suffixes and are not hidden, by name; a file is itself."""
    if not path.is_dir():
        return [path]
    names = [file.relative_to(path) for file in path.rglob("*") if file.suffix in suffixes and file.is_file()]
    return [path / name for name in sorted(names) if not _hidden(name.parts)]


def _sources(path: Path, encoding: str, suffixes: tuple[str, ...]) -> list[Source]:
    if path.suffix != ".zip":
        return [Source(path, None, path.stat().st_size, encoding)]
    try:
        with zipfile.ZipFile(path) as archive:
            members = sorted(archive.infolist(), key=lambda member: member.filename)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} can't be unpacked: {error}") from None
    kinds = tuple(suffix for suffix in suffixes if suffix != ".zip")
    wanted = [m for m in members if m.filename.endswith(kinds) and not _hidden(m.filename.split("/"))]
    for member in wanted:
        if member.file_size > max(UNPACKED_BYTES, UNPACKED_TIMES * member.compress_size):
            raise ValueError(
                f"{path}/{member.filename} unpacks to {member.file_size:,} bytes, over {UNPACKED_TIMES} times what it "
                "is packed: no text does; unpack it yourself if it is one"
            )
    return [Source(path, member.filename, member.file_size, encoding) for member in wanted]


def _hidden(parts: Iterable[str]) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _decoded(file: IO[bytes], name: str, encoding: str) -> Iterator[str]:
    """Bytes as text, without a byte order mark, and with every line end a `\n`."""
    block = file.read(max(BLOCK, 4))
    if codecs.lookup(encoding).name == "utf-8":
        encoding = next((wide for mark, wide in MARKS.items() if block.startswith(mark)), encoding)
    decoder = codecs.getincrementaldecoder(encoding)()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    read = 0
    while True:
        pending = len(decoder.getstate()[0])  # bytes of a character that the last block began
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeError as error:
            _check_nuls(block.count(0), block, read, name)
            place = ""
            if isinstance(error, UnicodeDecodeError):
                at = f"byte {read - pending + error.start} ({error.object[error.start]:#04x})"
                place = f": {at} begins no character"
            raise ValueError(
                f"{name} is not {encoding}{place}; a text in another encoding is read with {_option('latin-1')}"
            ) from None
        _check_nuls(text.count("\0"), block, read, name)
        if read == 0:
            text = text.removeprefix("\ufeff")
        read += len(block)
        if text := newlines.decode(text, final=not block):
            yield text
        if not block:
            return
        block = file.read(BLOCK)


def _check_nuls(count: int, block: bytes, start: int, name: str) -> None:
    """`ValueError` where a block with so many NUL characters, from byte `start` of the file on, is no text in the
    encoding that was tried; it says which one has zeros where these are."""
    if count <= NULS * len(block):
        return
    zeros = [block[(at - start) % 4 :: 4].count(0) / (len(block) / 4) for at in range(4)]  # by the place in four bytes
    even, odd = zeros[0] + zeros[2], zeros[1] + zeros[3]
    if min(zeros[2:]) > 0.9 > zeros[0] or min(zeros[:2]) > 0.9 > zeros[3]:
        wide = "utf-32-le" if zeros[3] > 0.9 else "utf-32-be"
    elif max(even, odd) > 8 * min(even, odd):
        wide = "utf-16-le" if odd > even else "utf-16-be"
    else:
        raise ValueError(f"{name} is no text: it is full of zero bytes")
    raise ValueError(f"{name} has a zero byte in every few, as {wide} does: read it with {_option(wide)}")


def _option(encoding: str) -> str:
    return f"`--encoding {encoding}` (by `llmfast train` with `--set encoding={encoding}`)"


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
        yield Part(text.rstrip() if separated else text)


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


def _part(record: Any, place: str) -> Part:
    if not isinstance(record, dict):
        record = {}
    if isinstance(record.get("text"), str):
        return Part(encodable(record["text"]))
    if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        return Part(encodable(record["completion"]), encodable(record["prompt"]))
    raise ValueError(f'{place}: needs a string "text", or "prompt" and "completion"')


def _lines(blocks: Iterable[str], name: str) -> Iterator[str]:
    rest: list[str] = []
    number, length = 1, 0  # of the line in `rest`
    for block in blocks:
        first, *lines = block.split("\n")
        rest.append(first)
        length += len(first)
        if length > LONGEST_LINE:
            raise ValueError(f"{name}, line {number} is longer than {LONGEST_LINE:,} characters")
        if lines:
            yield "".join(rest)
            yield from lines[:-1]
            rest, length = [lines[-1]], len(lines[-1])
            number += len(lines)
    yield "".join(rest)
