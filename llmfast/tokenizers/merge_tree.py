"""How a token of byte-level BPE was made: the merges behind it, as a tree of text."""

from __future__ import annotations

from collections.abc import Iterator

from llmfast.tokenizers.bpe import BPETokenizer
from llmfast.tokenizers.byte_letters import printable


def merge_tree(tokenizer: BPETokenizer, token: str) -> str:
    """The tree under a token, which is given as text or as an id; `ValueError` where the vocabulary lacks it.

    Bytes are spelled as in vocabulary files: `Ġ` is the blank.

    >>> print(merge_tree(BPETokenizer.train(["low low lower"], 260), "low"))
    low  id 257, merge 2
    ├── lo  id 256, merge 1
    │   ├── l  id 75
    │   └── o  id 78
    └── w  id 86
    """
    content = token.encode("utf-8", "replace")
    if content not in tokenizer.vocab and token.isdecimal():
        content = tokenizer.decode_bytes([int(token)])
    if content not in tokenizer.vocab:
        if token in tokenizer.special_tokens or content.decode() in tokenizer.special_tokens:
            raise ValueError(f"{content.decode()} is a special token, which no merges make")
        raise ValueError(f"{token!r} is not a token of this vocabulary, nor the id of one")
    steps = {left + right: (step, left, right) for step, (left, right) in reversed([*enumerate(tokenizer.merges, 1)])}

    def lines(piece: bytes, first: str, rest: str) -> Iterator[str]:
        made = f", merge {steps[piece][0]}" if piece in steps else ""
        yield f"{first}{printable(piece)}  id {tokenizer.vocab[piece]}{made}"
        if piece in steps:
            _, left, right = steps[piece]
            yield from lines(left, f"{rest}├── ", f"{rest}│   ")
            yield from lines(right, f"{rest}└── ", f"{rest}    ")

    return "\n".join(lines(content, "", ""))
