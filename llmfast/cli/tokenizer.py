"""`llmfast tokenizer`: train one, and see what one makes of a text."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from llmfast.cli.common import common_options
from llmfast.cli.progress import progress_bars
from llmfast.documents import Source, find_sources
from llmfast.tokenizers import (
    DEFAULT_VOCAB_SIZES,
    TRAINABLE,
    BPETokenizer,
    Tokenizer,
    WordPieceTokenizer,
    gpt2_tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from llmfast.tokenizers.bpe import TRAINERS
from llmfast.tokenizers.bpe_training import has_library
from llmfast.tokenizers.byte_letters import printable
from llmfast.tokenizers.merge_tree import merge_tree
from llmfast.tokenizers.protocol import TOKENIZER_FILES
from llmfast.tokenizers.splitting import SPLIT_PATTERNS
from llmfast.tokenizers.wordpiece_training import CONTINUATION
from llmfast.weights.locate import locate_model

OPTIONS = {"bpe": ("split", "special_tokens", "trainer"), "wordpiece": ("min_count", "lowercase")}  # beyond the size
COLOURS = ("on dark_blue", "on dark_green", "on dark_red", "on purple4", "on dark_cyan")

which = click.option(
    "-t",
    "--tokenizer",
    "name",
    default="stories",
    show_default=True,
    help="A directory that holds one, the name of a model, or gpt2.",
)


@click.group()
def tokenizer() -> None:
    """Train a tokenizer, encode and decode with one, and see how it splits a text."""


@tokenizer.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The directory to write.")
@click.option("--kind", type=click.Choice(list(TRAINABLE)), default="bpe", show_default=True)
@click.option("--vocab-size", type=click.IntRange(min=1), help="Tokens [default: 4000; word 10000; char all].")
@click.option("--split", type=click.Choice(list(SPLIT_PATTERNS)), help="bpe: how text is split first [default: gpt2].")
@click.option("--special", "special_tokens", multiple=True, metavar="TOKEN", help="bpe: one more special token.")
@click.option("--trainer", type=click.Choice(TRAINERS), help="bpe: who learns the (same) merges [default: auto].")
@click.option(
    "--min-count",
    type=click.IntRange(min=1),
    help="wordpiece: join no rarer pair [default: as few as fill the vocabulary].",
)
@click.option("--lowercase", is_flag=True, help="wordpiece: without capitals and accents.")
@click.option("--trace", is_flag=True, help="bpe, wordpiece: print every merge as it is learned.")
@click.option("--encoding", default="utf-8", show_default=True, help="Of text files.")
@click.option("--overwrite", is_flag=True, help="Replace a tokenizer that --out holds.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a line.")
@common_options
def train(
    files: tuple[Path, ...],
    out: Path,
    kind: str,
    vocab_size: int | None,
    trace: bool,
    encoding: str,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a tokenizer on FILES (text, .jsonl, .zip, or folders of them) and write it into --out."""
    given = {name: value for name, value in options.items() if value}
    for name in given:
        if name not in OPTIONS.get(kind, ()):
            raise ValueError(f"--{name.removesuffix('_tokens').replace('_', '-')} is not an option of the kind {kind}")
    taken = [file for file in TOKENIZER_FILES if (out / file).exists()]
    if taken and not overwrite:
        raise ValueError(f"{out} holds {taken[0]} already: name another directory, or pass --overwrite")
    if trace:
        if as_json:
            raise ValueError("--trace prints lines for people, and --json an object: choose one of them")
        if kind not in OPTIONS:
            raise ValueError(f"--trace shows merges, and the kind {kind} has none")
        given["on_merge"] = _print_merge
    sources = find_sources(files, encoding)
    if trace or _by_library(kind, given):  # which draws its own bars
        made = train_tokenizer(kind, _texts(sources), vocab_size, **given)
    else:
        with progress_bars() as progress:
            if kind in OPTIONS:
                total = vocab_size or DEFAULT_VOCAB_SIZES[kind]
                given["on_merge"] = lambda step, *_: progress("merging", step, total)
            made = train_tokenizer(kind, _texts(sources, progress), vocab_size, **given)
    made.save(out)
    record = {"path": str(out), "kind": kind, "vocab_size": made.vocab_size, "special_tokens": made.special_tokens}
    if as_json:
        click.echo(json.dumps(record))
    else:
        click.echo(f"{kind}, {made.vocab_size:,} tokens, in {out}")


@tokenizer.command()
@click.argument("text")
@which
@click.option("--special", is_flag=True, help="Names of special tokens in TEXT are these tokens.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
@common_options
def encode(text: str, name: str, special: bool, as_json: bool) -> None:
    """Print the token ids of TEXT (- reads it from stdin)."""
    ids = _named(name).encode(_argument(text), allow_special=special)
    click.echo(json.dumps(ids) if as_json else " ".join(map(str, ids)))


@tokenizer.command()
@click.argument("ids", nargs=-1, required=True)
@which
@common_options
def decode(ids: tuple[str, ...], name: str) -> None:
    """Print the text of the token IDS, which blanks or commas separate (- reads them from stdin)."""
    words = [word for text in ids for word in _argument(text).strip().strip("[]").replace(",", " ").split()]
    for word in words:
        if not word.isdecimal():
            raise ValueError(f"{word!r} is not a token id")
    click.echo(_named(name).decode(map(int, words)))


@tokenizer.command()
@click.argument("text")
@which
@click.option("--token", is_flag=True, help="TEXT is one token, or its id: show the merges that made it.")
@click.option("--special", is_flag=True, help="Names of special tokens in TEXT are these tokens.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of the tokens.")
@common_options
def inspect(text: str, name: str, token: bool, special: bool, as_json: bool) -> None:
    """Show how TEXT (- reads it from stdin) splits into tokens, in colour."""
    made = _named(name)
    if token:
        if not isinstance(made, BPETokenizer):
            raise ValueError(f"--token shows merges, which a tokenizer of the kind {made.kind} does not keep: only bpe")
        click.echo(merge_tree(made, text))
        return
    text = _argument(text)
    ids = made.encode(text, allow_special=special)
    pieces = [made.tokens[i] if isinstance(made, WordPieceTokenizer) else _shown(made.decode_bytes([i])) for i in ids]
    if as_json:
        rows = [{"id": i, "text": piece} for i, piece in zip(ids, pieces, strict=True)]
        click.echo(json.dumps(rows, ensure_ascii=False))
        return
    console = Console()
    line = Text(overflow="fold")
    for number, piece in enumerate(pieces):
        line.append(piece, style=f"white {COLOURS[number % len(COLOURS)]}")
        if not console.is_terminal:
            line.append("│")  # where colours can't show it
        if piece.endswith("↵"):
            line.append("\n")
    console.print(line)
    click.echo(" ".join(map(str, ids)))
    size = len(text.encode("utf-8", "replace"))
    ratio = f", {size / len(ids):.2f} bytes a token" if ids else ""
    click.echo(f"{len(ids):,} tokens, {size:,} bytes{ratio}; {made.kind}, {made.vocab_size:,} tokens")


def _by_library(kind: str, options: dict[str, Any]) -> bool:
    if kind != "bpe" or options.get("trainer", "auto") == "python" or not has_library():
        return False
    options["show_progress"] = sys.stderr.isatty()
    return True


def _print_merge(step: int, pair: tuple[Any, Any], weight: float) -> None:
    """A line for people: the step, what was joined into what, and its count (WordPiece: its score)."""
    left, right = pair
    if isinstance(left, bytes):
        left, right = printable(left), printable(right)
        joined, why = left + right, f"{weight:,} times"
    else:
        joined, why = left + right.removeprefix(CONTINUATION), f"score {weight:.3g}"
    click.echo(f"{step + 1:6}  {left} + {right} → {joined}  ({why})")


def _texts(sources: list[Source], progress: Any = lambda *_: None) -> Iterator[str]:
    total, done = sum(source.size for source in sources), 0
    for source in sources:
        for part in source.parts():
            if part.prompt:
                yield part.prompt
            yield part.text
            done += len(part.prompt.encode()) + len(part.text.encode())
            progress("reading", done, total)


def _named(name: str) -> Tokenizer:
    if name == "gpt2" and not Path(name).exists():
        return gpt2_tokenizer()
    path = locate_model(name)
    found = load_tokenizer(path)
    if found is None:
        raise FileNotFoundError(f"no tokenizer in {path}")
    return found


def _argument(text: str) -> str:
    return sys.stdin.read() if text == "-" else text


def _shown(token: bytes) -> str:
    """A token as it can be printed: line ends and tabs by a sign, the bytes of a part of a character in hexadecimal."""
    try:
        text = token.decode()
    except UnicodeDecodeError:
        return "".join(f"<{byte:02X}>" for byte in token)
    return "".join({"\n": "↵", "\t": "⇥"}.get(c, c if c.isprintable() else f"<U+{ord(c):04X}>") for c in text)
