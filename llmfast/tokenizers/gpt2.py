"""GPT-2's tokenizer: 50,000 merges learned by its authors, 50,257 tokens.

The vocabulary is not shipped here. It is read from a checkpoint's own files, or through tiktoken: from its cache
(`TIKTOKEN_CACHE_DIR`) where that holds it, else by its download.
"""

from __future__ import annotations

from pathlib import Path

import tiktoken

from llmfast.tokenizers.bpe import BPETokenizer


def gpt2_tokenizer(directory: str | Path | None = None) -> BPETokenizer:
    """GPT-2's tokenizer, from the `vocab.json` and `merges.txt` in `directory`, or from tiktoken.

    `FileNotFoundError` with what to do where neither has it.
    """
    if directory is not None:
        return BPETokenizer.load(directory)
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # the download fails in as many ways as a network does
        raise FileNotFoundError(
            "GPT-2's vocabulary is neither in tiktoken's cache nor can it be downloaded "
            f"({type(error).__name__}): give a directory with vocab.json and merges.txt, or set TIKTOKEN_CACHE_DIR"
        ) from None
    ranks = encoding._mergeable_ranks
    return BPETokenizer(ranks, merges_of_ranks(ranks), encoding._special_tokens)


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
