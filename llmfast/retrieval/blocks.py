"""Files to blocks of text: paragraphs, each with the heading it stands under and its place.

Text and Markdown by line, HTML by element, PDF by page; a library reads each kind (markdown-it-py, beautifulsoup4,
pypdf), and a file is bounded before it is read.
"""

from __future__ import annotations

import io
import logging
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from llmfast.documents import decode_text

MOST_BYTES = 64 << 20  # of a document
MOST_PAGES = 20_000  # of a PDF
MOST_TEXT = 64 << 20  # characters of a document's text, which a PDF may unpack to more than its bytes
MOST_PARAGRAPH = 1 << 16  # characters of a block; a longer one becomes several
SECONDS = 300.0  # to read one PDF, which a broken one may never let end
LEFT_OUT = ("script", "style", "noscript", "template", "nav", "svg", "head")  # of a page, what nobody reads
TEXT_ELEMENTS: tuple[str, ...] = (
    "p",
    "li",
    "pre",
    "blockquote",
    "td",
    "th",
    "dt",
    "dd",
    "figcaption",
    "summary",
    "div",
    "section",
)
TEXT_ELEMENTS += ("article", "main", "body", "tr", "table", "ul", "ol", "dl", "header", "footer", "aside")
HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")


@dataclass(frozen=True)
class Block:
    """A paragraph, under the headings above it (outermost first), at a `place` in words: "line 12", "page 3"."""

    text: str
    headings: tuple[str, ...] = ()
    place: str = ""


def read_blocks(data: bytes, name: str, encoding: str = "utf-8") -> list[Block]:
    """The blocks of a file by the suffix of its name. `ValueError` in one line names a file without text, and why."""
    reader = READERS[PurePath(name).suffix.lower()]
    blocks: list[Block] = []
    length = 0
    for block in _read(reader(data, name, encoding), name):
        for at in range(0, len(block.text), MOST_PARAGRAPH):
            if text := block.text[at : at + MOST_PARAGRAPH].strip():
                blocks.append(Block(text, block.headings, block.place))
                length += len(text)
        if length > MOST_TEXT:
            raise ValueError(f"{name} holds over {MOST_TEXT >> 20} million characters of text")
    if not blocks:
        raise ValueError(f"{name} holds no text" + (WITHOUT_TEXT if name.lower().endswith(".pdf") else ""))
    return blocks


def _read(blocks: Iterator[Block], name: str) -> Iterator[Block]:
    try:
        yield from blocks
    except ImportError as error:
        raise ValueError(f'{name} needs {error.name}, which pip install -e ".[rag]" brings') from None


def text_blocks(data: bytes, name: str, encoding: str) -> Iterator[Block]:
    """Paragraphs, which blank lines divide."""
    line = 1
    for part in re.split(r"(\n[^\S\n]*\n\s*)", decode_text(data, name, encoding)):
        if part.strip():
            leading = len(part) - len(part.lstrip("\n"))
            yield Block(part.strip("\n"), (), f"line {line + leading}")
        line += part.count("\n")


def markdown_blocks(data: bytes, name: str, encoding: str) -> Iterator[Block]:
    """What stands at the top of the document: paragraphs, whole lists, tables and code, as they are written."""
    from markdown_it import MarkdownIt

    text = decode_text(data, name, encoding)
    lines = text.split("\n")
    headings: list[tuple[int, str]] = []
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for number, token in enumerate(tokens):
        if token.level or token.map is None or token.nesting < 0:
            continue
        first, end = token.map
        if token.type == "heading_open":
            depth = int(token.tag[1:])
            headings = [heading for heading in headings if heading[0] < depth]
            headings.append((depth, tokens[number + 1].content.strip()))
        else:
            above = tuple(heading for _, heading in headings)
            yield Block("\n".join(lines[first:end]).strip("\n"), above, f"line {first + 1}")


def html_blocks(data: bytes, name: str, encoding: str) -> Iterator[Block]:
    """The text of each element that is set apart from what is around it."""
    from bs4 import BeautifulSoup, NavigableString, Tag

    declared = re.search(rb"<meta[^>]{0,200}charset=[\"']?([\w-]+)", data[:4096], re.IGNORECASE)
    if declared is not None and encoding == "utf-8":
        encoding = declared[1].decode()
    try:
        soup = BeautifulSoup(decode_text(data, name, encoding), "html.parser")
    except RecursionError:
        raise ValueError(f"{name} nests its elements too deeply") from None
    headings: list[tuple[int, str]] = []
    pieces: list[str] = []

    def block() -> Iterator[Block]:
        text = re.sub(r"[^\S\n]+", " ", "".join(pieces)).strip()
        pieces.clear()
        if text:
            yield Block(text, tuple(heading for _, heading in headings))

    # Depth first, without recursion: (element, whether it is being left).
    stack: list[tuple[Any, bool]] = [(soup, False)]
    while stack:
        node, leaving = stack.pop()
        if type(node) is NavigableString:
            pieces.append(str(node) if node.find_parent("pre") else re.sub(r"\s+", " ", str(node)))
        elif isinstance(node, Tag) and node.name in HEADINGS:
            yield from block()
            depth = int(node.name[1])
            headings = [heading for heading in headings if heading[0] < depth]
            if title := " ".join(node.get_text(" ").split()):
                headings.append((depth, title))
        elif isinstance(node, Tag) and node.name not in LEFT_OUT:
            if node.name in TEXT_ELEMENTS:
                yield from block()
            elif node.name == "br":
                pieces.append("\n")
            if not leaving:
                stack.append((node, True)) if node.name in TEXT_ELEMENTS else None
                stack.extend((child, False) for child in reversed(node.contents))
    yield from block()


WITHOUT_TEXT = ": its pages are pictures, or blank (a program for OCR makes pictures text)"


def pdf_blocks(data: bytes, name: str, encoding: str) -> Iterator[Block]:
    """The text of each page, its lines joined to paragraphs where they end in the middle of a sentence."""
    for number, text in _within(SECONDS, lambda: list(_pages(data, name)), name):
        for paragraph in re.split(r"\n\s*\n", _unwrapped(text)):
            if paragraph.strip():
                yield Block(paragraph.strip(), (), f"page {number}")


def _pages(data: bytes, name: str) -> Iterator[tuple[int, str]]:
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns of every flaw that it reads past
    length = 0
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise ValueError("it needs a password")
        if len(reader.pages) > MOST_PAGES:
            raise ValueError(f"it has {len(reader.pages):,} pages, over {MOST_PAGES:,}")
        for number, page in enumerate(reader.pages, start=1):
            text = page.extract_text()
            length += len(text)
            if length > MOST_TEXT:
                raise ValueError(f"it holds over {MOST_TEXT >> 20} million characters of text")
            yield number, text
    except Exception as error:  # a library that meets broken files raises whatever it stumbles over
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} can't be read as PDF: {reason}") from None


def _within(seconds: float, work: Callable[[], Any], name: str) -> Any:
    """What `work` gives, or `ValueError` where that takes too long; it is then left to itself."""
    result: list[Any] = []
    error: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as failure:
            error.append(failure)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise ValueError(f"{name} took over {seconds:.0f} s to read")
    if error:
        raise error[0]
    return result[0]


def _unwrapped(text: str) -> str:
    """Lines that a page's width has broken, as one: words divided by a hyphen, and long lines that end in the middle of
    a sentence. A short line is a title, or the last of a paragraph."""
    lines = re.sub(r"(?<=[a-zà-ÿ])-\n(?=[a-zà-ÿ])", "", text).split("\n")
    full = 0.6 * max(map(len, lines))
    joined = lines[0]
    for before, line in zip(lines, lines[1:], strict=False):
        broken = len(before) >= full and re.search(r"[^.!?:\s]\s*$", before) and re.match(r"[^\s•\-\d]", line)
        joined += f" {line}" if broken else f"\n{line}"
    return joined


READERS: dict[str, Callable[[bytes, str, str], Iterator[Block]]] = {
    ".txt": text_blocks,
    ".text": text_blocks,
    ".md": markdown_blocks,
    ".markdown": markdown_blocks,
    ".html": html_blocks,
    ".htm": html_blocks,
    ".pdf": pdf_blocks,
}
SUFFIXES = (*READERS, *(suffix.upper() for suffix in READERS))
