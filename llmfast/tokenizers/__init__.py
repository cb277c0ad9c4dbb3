"""Text to token ids and back: one protocol, one small file an idea."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmfast.tokenizers import bpe_files
from llmfast.tokenizers.bpe import BPETokenizer
from llmfast.tokenizers.char import CharTokenizer
from llmfast.tokenizers.gpt2 import gpt2_tokenizer
from llmfast.tokenizers.model_files import read_config
from llmfast.tokenizers.protocol import Tokenizer, read_json
from llmfast.tokenizers.sentencepiece import SentencePieceTokenizer
from llmfast.tokenizers.word import WordTokenizer
from llmfast.tokenizers.wordpiece import WordPieceTokenizer

__all__ = [
    "TRAINABLE",
    "BPETokenizer",
    "CharTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "WordPieceTokenizer",
    "WordTokenizer",
    "gpt2_tokenizer",
    "load_tokenizer",
    "train_tokenizer",
]

# The kinds that can be trained, by the names that the command line knows.
TRAINABLE: dict[str, Any] = {
    kind.kind: kind for kind in (CharTokenizer, WordTokenizer, BPETokenizer, WordPieceTokenizer)
}
DEFAULT_VOCAB_SIZES = {"bpe": 4000, "wordpiece": 4000, "word": 10_000}  # of characters all are kept


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int | None = None, **options: Any) -> Tokenizer:
    """A tokenizer of one of the kinds in `TRAINABLE`, trained on `texts`; `options` as in the kind's own `train`."""
    if kind not in TRAINABLE:
        raise ValueError(f"no tokenizer of the kind {kind!r} can be trained; choose {', '.join(TRAINABLE)}")
    size = DEFAULT_VOCAB_SIZES.get(kind) if vocab_size is None else vocab_size
    tokenizer: Tokenizer = TRAINABLE[kind].train(texts, size, **options)
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer in a model's directory, beside its weight file, or in its `.gguf` file; None where there is none.
    `ValueError` where its files are damaged, or ask for what is not computed here.

    In a directory `tokenizer_config.json` says of which kind it is. Kinds of this project are read by their own
    classes, others from `tokenizer.json` or else SentencePiece's `tokenizer.model`.
    """
    path = Path(path)
    if path.suffix == ".gguf" and path.is_file():
        return _from_gguf(path)
    path = path.parent if path.is_file() else path
    config = path / "tokenizer_config.json"
    named = read_json(config).get("tokenizer_class") if config.exists() else None
    kind: Any = BPETokenizer
    if named in (CharTokenizer.__name__, WordTokenizer.__name__):
        kind = CharTokenizer if named == CharTokenizer.__name__ else WordTokenizer
    elif "Bert" in (named or "Bert") and (path / "vocab.txt").exists():
        kind = WordPieceTokenizer
    elif (path / "tokenizer.json").exists() and not bpe_files.is_own(path / "tokenizer.json"):
        from llmfast.tokenizers.library import LibraryTokenizer as kind  # a library that own kinds do without
    elif (path / "tokenizer.model").exists():
        kind = SentencePieceTokenizer
    try:
        tokenizer: Tokenizer = kind.load(path)
    except FileNotFoundError:
        return None
    if tokenizer.chat_template is None:
        tokenizer.chat_template = read_config(path).get("chat_template")
    return tokenizer


def _from_gguf(path: Path) -> Tokenizer | None:
    from llmfast.tokenizers.gguf import tokenizer_of
    from llmfast.weights.gguf import GGUFFile  # files of weights know nothing of tokenizers, so this looks up one floor

    metadata = GGUFFile(path).metadata
    if metadata.get("tokenizer.ggml.model") in (None, "none", "no_vocab"):
        return None
    try:
        return tokenizer_of(metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
