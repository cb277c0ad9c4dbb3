"""The tokenizer in a GGUF file's metadata (`tokenizer.ggml.*`): byte-level BPE ("gpt2") or SentencePiece's ("llama").

Byte-level BPE is built as a `tokenizers.Tokenizer`: the file has its vocabulary and merges, and names the way in which
text is split first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from llmfast.tokenizers.library import LibraryTokenizer
from llmfast.tokenizers.sentencepiece import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Piece, SentencePieceTokenizer
from llmfast.tokenizers.splitting import GPT2_SPLIT_PATTERN

PREFIX = "tokenizer.ggml."
MOST_TOKENS, MOST_MERGES, LONGEST_TOKEN = 1 << 21, 1 << 22, 1 << 16
# As in the tokenizer.json of these families: contractions in capitals too, a sign before a word goes with it.
WORDS_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{numbers}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Splitting:
    """How a family splits a text before merging: by one pattern after the other."""

    patterns: tuple[str, ...]
    composes: bool = False  # characters first take Unicode's composed form (NFC)
    ignore_merges: bool = False  # a whole chunk that is a token is this token, whatever the merges make of it
    starts: bool = False  # texts begin with the file's beginning-of-text, unless it says otherwise


SINGLE_DIGITS = Splitting((r"\p{N}", GPT2_SPLIT_PATTERN))
LLAMA_3 = Splitting((WORDS_PATTERN.format(numbers="{1,3}"),), ignore_merges=True, starts=True)
QWEN_2 = Splitting((WORDS_PATTERN.format(numbers=""),), composes=True)
SPLITTINGS = {
    "gpt-2": Splitting((GPT2_SPLIT_PATTERN,)),
    "starcoder": SINGLE_DIGITS,
    "refact": SINGLE_DIGITS,
    "smollm": SINGLE_DIGITS,
    "llama-bpe": LLAMA_3,
    "llama3": LLAMA_3,
    "llama-v3": LLAMA_3,
    "qwen2": QWEN_2,
    "deepseek-r1-qwen": QWEN_2,
}


def tokenizer_of(metadata: Mapping[str, Any]) -> LibraryTokenizer | SentencePieceTokenizer:
    """`ValueError` in one line for metadata that lacks something, is damaged, or asks for what is not computed here."""
    kind = _get(metadata, "model", str)
    tokens = _list(metadata, "tokens", str, MOST_TOKENS)
    if longest := next((token for token in tokens if len(token) > LONGEST_TOKEN), None):
        raise ValueError(f"{PREFIX}tokens holds one of {len(longest)} characters, more than {LONGEST_TOKEN}")
    kinds = _list(metadata, "token_type", int, MOST_TOKENS, [NORMAL] * len(tokens))
    if len(kinds) != len(tokens):
        raise ValueError(f"{PREFIX}token_type is of {len(kinds)} tokens, but there are {len(tokens)}")
    config = _config(metadata, tokens)
    if kind == "llama":
        scores = _list(metadata, "scores", float, MOST_TOKENS, [0.0] * len(tokens))
        if len(scores) != len(tokens):
            raise ValueError(f"{PREFIX}scores is of {len(scores)} tokens, but there are {len(tokens)}")
        prefix = _get(metadata, "add_space_prefix", bool, True)
        return SentencePieceTokenizer(list(map(Piece, tokens, scores, kinds)), prefix, {"add_bos_token": True} | config)
    if kind != "gpt2":
        raise ValueError(f"{PREFIX}model {kind!r} is not known here, only gpt2 (byte-level BPE) and llama")
    split = _get(metadata, "pre", str)
    if split not in SPLITTINGS:
        raise ValueError(f"{PREFIX}pre {split!r} is not known here, only {', '.join(SPLITTINGS)}")
    merges = _list(metadata, "merges", str, MOST_MERGES)
    return _byte_level(tokens, kinds, merges, SPLITTINGS[split], config)


def _byte_level(
    tokens: list[str], kinds: list[int], merges: list[str], splitting: Splitting, config: dict[str, Any]
) -> LibraryTokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise ValueError(f"{PREFIX}tokens holds {twice!r} twice")
    # A blank may be the first character of a token, which the blank between the two then follows.
    pairs = [(merge[:at], merge[at + 1 :]) for merge in merges for at in [merge.find(" ", 1)]]
    try:
        tokenizer = Tokenizer(models.BPE(vocab, pairs, ignore_merges=splitting.ignore_merges))
    except Exception as error:  # the library raises plain `Exception`
        raise ValueError(f"{PREFIX}merges does not fit {PREFIX}tokens: {error}") from None
    if splitting.composes:
        tokenizer.normalizer = normalizers.NFC()
    split = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splitting.patterns]
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, normalized=False, special=kind != USER_DEFINED)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (CONTROL, UNKNOWN, USER_DEFINED) and token
    ]
    tokenizer.add_tokens(added)
    return LibraryTokenizer(tokenizer, {"add_bos_token": splitting.starts} | config)


def _config(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """What transformers keeps in `tokenizer_config.json`."""
    config: dict[str, Any] = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        i = _get(metadata, f"{key}_token_id", int, None)
        if i is None or i == 2**32 - 1:  # -1, as some files have it
            continue
        if not 0 <= i < len(tokens):
            raise ValueError(f"{PREFIX}{key}_token_id is {i}, but there are {len(tokens)} tokens")
        config[f"{role}_token"] = tokens[i]
    if (starts := _get(metadata, "add_bos_token", bool, None)) is not None:
        config["add_bos_token"] = starts
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise ValueError("tokenizer.chat_template should be a string")
    return config | ({"chat_template": template} if template else {})


_MISSING: Any = object()


def _get(metadata: Mapping[str, Any], key: str, kind: type, default: Any = _MISSING) -> Any:
    value = metadata.get(PREFIX + key, default)
    if value is _MISSING:
        raise ValueError(f"the file has no {PREFIX}{key}")
    if value is not default and type(value) is not kind:
        raise ValueError(f"{PREFIX}{key} should be of the type {kind.__name__}, got {type(value).__name__}")
    return value


def _list(metadata: Mapping[str, Any], key: str, kind: type, most: int, default: Any = _MISSING) -> list[Any]:
    """A list, or anything that has the `tolist` of an array, of `kind`."""
    value = metadata.get(PREFIX + key, default)
    if value is _MISSING:
        raise ValueError(f"the file has no {PREFIX}{key}")
    few = hasattr(value, "__len__") and len(value) <= most
    value = value.tolist() if few and hasattr(value, "tolist") else value
    if not few or not isinstance(value, list) or not set(map(type, value)) <= {kind}:
        raise ValueError(f"{PREFIX}{key} should be a list of at most {most} values of the type {kind.__name__}")
    return value
