"""A byte-level BPE vocabulary in Hugging Face's files.

With GPT-2's split: `vocab.json` and `merges.txt`, as GPT-2's own. With another: `tokenizer.json`, which says how text
is split. `tokenizer_config.json` beside them names the special tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmfast.tokenizers.byte_letters import printable, unprintable
from llmfast.tokenizers.protocol import END_OF_TEXT, read_json, write_files
from llmfast.tokenizers.splitting import SPLIT_PATTERNS, split_pattern

VOCAB, MERGES, LIBRARY, CONFIG = "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"


@dataclass(frozen=True)
class BPEFiles:
    """What the files say."""

    vocab: dict[bytes, int]
    merges: list[tuple[bytes, bytes]]
    special_tokens: dict[str, int]
    split: str = "gpt2"
    chat_template: str | None = None


def write(directory: str | Path, files: BPEFiles) -> None:
    vocab = {printable(token): i for token, i in files.vocab.items()}
    pairs = [(printable(left), printable(right)) for left, right in files.merges]
    config: dict[str, Any] = {"tokenizer_class": "GPT2Tokenizer"}
    if files.split == "gpt2":
        lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs), ""]
        contents = {
            VOCAB: json.dumps(vocab | files.special_tokens, ensure_ascii=False),
            MERGES: "\n".join(lines),
        }
    else:
        config = {"tokenizer_class": "PreTrainedTokenizerFast"}
        document = _library_document(vocab, pairs, files.special_tokens, files.split)
        contents = {LIBRARY: json.dumps(document, ensure_ascii=False)}
    if END_OF_TEXT in files.special_tokens:
        config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    if set(files.special_tokens) > {END_OF_TEXT}:
        config["added_tokens_decoder"] = {str(t.pop("id")): t for t in _added_tokens(files.special_tokens)}
    write_files(directory, contents | {CONFIG: json.dumps(config, indent=2)}, files.chat_template)


def read(directory: Path) -> tuple[BPEFiles, Path]:
    """What the files in `directory` say, and the one that holds the vocabulary. `FileNotFoundError` where there are
    none, `ValueError` naming one that is damaged."""
    path = directory / VOCAB
    if path.exists() and (directory / MERGES).exists():
        vocab, merges = read_json(path), read_merges(directory / MERGES)
        names = {END_OF_TEXT, *_named_in_config(directory / CONFIG)}
        special = {text: i for text, i in vocab.items() if text in names}
        split = "gpt2"
    elif (path := directory / LIBRARY).exists():
        vocab, merges, special, split = _read_library(path)
    else:
        wanted = f"{VOCAB} and {MERGES}, or {LIBRARY}"
        raise FileNotFoundError(f"no tokenizer in {directory}: expected {wanted}")
    try:
        ordinary = {unprintable(text): i for text, i in vocab.items() if text not in special}
    except ValueError as error:
        raise ValueError(f"{path} is not a valid byte-level BPE vocabulary: {error}") from None
    return BPEFiles(ordinary, merges, special, split), path


def read_merges(path: Path) -> list[tuple[bytes, bytes]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        return [(unprintable(left), unprintable(right)) for left, right in pairs]
    except ValueError as error:
        raise ValueError(f"{path} is not a list of merges: {error}") from None


def _named_in_config(path: Path) -> set[str]:
    """The special tokens besides end-of-text that `tokenizer_config.json` lists."""
    if not path.exists():
        return set()
    listed = read_json(path).get("added_tokens_decoder", {})
    try:
        return {token["content"] for token in listed.values() if token.get("special")}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: added_tokens_decoder is not understood: {error!r}") from None


def _added_tokens(special_tokens: dict[str, int]) -> list[dict[str, Any]]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": i, "content": text} | plain for text, i in sorted(special_tokens.items(), key=lambda item: item[1])]


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _library_document(
    vocab: dict[str, int], pairs: list[tuple[str, str]], special_tokens: dict[str, int], split: str
) -> dict[str, Any]:
    """`tokenizer.json`, the file of the `tokenizers` library."""
    pattern = {"type": "Split", "pattern": {"Regex": split_pattern(split)}, "behavior": "Isolated", "invert": False}
    nothing = ("truncation", "padding", "normalizer", "post_processor")
    return dict.fromkeys(nothing) | {
        "version": "1.0",
        "added_tokens": _added_tokens(special_tokens),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [pattern, BYTE_LEVEL]},
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": vocab, "merges": pairs, "unk_token": None},
    }


def is_own(path: Path) -> bool:
    """Whether a `tokenizer.json` says no more than is read here: then it can be shown, trained on and converted, too.

    Its text is split as by `splitting`, then merged, and all of its added tokens are special and match as they stand.
    """
    document = read_json(path)
    try:
        _, _, special, _ = _of_library(document)
    except (KeyError, ValueError, TypeError, AttributeError):
        return False
    model, after = document["model"], document.get("post_processor") or {"type": "ByteLevel"}
    beyond = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    added = document.get("added_tokens", [])
    return (
        after["type"] in ("ByteLevel", "TemplateProcessing")
        and not after.get("special_tokens")  # which it would put around every text
        and not any(model.get(setting) for setting in beyond)
        and len(special) == len(added)
        and not any(token.get("lstrip") or token.get("rstrip") for token in added)
    )


def _read_library(path: Path) -> tuple[dict[str, int], list[tuple[bytes, bytes]], dict[str, int], str]:
    """Vocabulary, merges, special tokens and split of a `tokenizer.json`."""
    document = read_json(path)
    try:
        return _of_library(document)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a byte-level BPE tokenizer: {error}") from None


def _of_library(document: dict[str, Any]) -> tuple[dict[str, int], list[tuple[bytes, bytes]], dict[str, int], str]:
    model, split = document["model"], _split_of(document["pre_tokenizer"] or {})
    if model["type"] != "BPE" or split is None or document.get("normalizer"):
        raise ValueError(f"only BPE that splits text into bytes as {' or '.join(SPLIT_PATTERNS)} does is read")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merges = [(unprintable(left), unprintable(right)) for left, right in pairs]
    special = {token["content"]: token["id"] for token in document.get("added_tokens", []) if token["special"]}
    return dict(model["vocab"]), merges, special, split


def _split_of(pre_tokenizer: dict[str, Any]) -> str | None:
    """The name of the pattern by which a pre-tokenizer of the library splits, or None for one that is not read here."""
    if pre_tokenizer.get("type") == "ByteLevel":
        return "gpt2" if pre_tokenizer.get("use_regex", True) and not pre_tokenizer["add_prefix_space"] else None
    if pre_tokenizer.get("type") != "Sequence" or len(pre_tokenizer["pretokenizers"]) != 2:
        return None
    first, second = pre_tokenizer["pretokenizers"]
    whole = first.get("behavior") == "Isolated" and not first.get("invert", False) and first.get("type") == "Split"
    as_bytes = second.get("type") == "ByteLevel" and not second.get("use_regex", True)
    if not whole or not as_bytes or second["add_prefix_space"]:
        return None
    pattern = first["pattern"].get("Regex")
    return next((name for name, known in SPLIT_PATTERNS.items() if known == pattern), None)
