"""A tokenizer as the values of a GGUF file, `tokenizer.…`, for llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llmfast.tokenizers.bpe import BPETokenizer
from llmfast.tokenizers.byte_letters import printable
from llmfast.tokenizers.protocol import Tokenizer
from llmfast.tokenizers.sentencepiece import CONTROL, NORMAL, UNUSED, USER_DEFINED, SentencePieceTokenizer
from llmfast.tokenizers.splitting import GPT2_SPLIT_PATTERN


def metadata_of(tokenizer: Tokenizer | None, rows: int) -> tuple[dict[str, Any], str | None]:
    """The values for a model whose embedding has so many `rows`; without any, why llama.cpp has no such tokenizer.

    Rows beyond the vocabulary get tokens that no text becomes.
    """
    if tokenizer is None:
        return {}, "the model has no tokenizer: llama.cpp can run it on token ids only"
    if tokenizer.vocab_size > rows:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, but the model's embedding {rows} rows")
    values: dict[str, Any] | None = None
    if isinstance(tokenizer, BPETokenizer):
        values = _of_bpe(tokenizer)
    elif isinstance(tokenizer, SentencePieceTokenizer):
        values = _of_sentencepiece(tokenizer)
    elif tokenizer.kind == "library":
        values = _of_library(tokenizer)
    if values is None:
        return {}, f"llama.cpp has no such tokenizer ({tokenizer.kind}): it can run the model on token ids only"
    beyond = range(len(values["tokens"]), rows)
    values["tokens"] += [f"[unused {i}]" for i in beyond]
    values["token_type"] += [UNUSED] * len(beyond)
    if "scores" in values:
        values["scores"] += [0.0] * len(beyond)
    values["add_bos_token"] = tokenizer.start_of_text is not None
    for role, token in (("bos", tokenizer.start_of_text), ("eos", tokenizer.end_of_text)):
        if token is not None:
            values.setdefault(f"{role}_token_id", token)
    values.setdefault("bos_token_id", values.get("eos_token_id"))  # or llama.cpp takes token 11
    values = {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}
    template = tokenizer.chat_template
    return values | ({"tokenizer.chat_template": template} if template else {}), None


def _of_bpe(tokenizer: BPETokenizer) -> dict[str, Any] | None:
    if tokenizer.split != "gpt2":
        return None  # llama.cpp has no pattern that splits like GPT-4's
    names = {i: (printable(token), NORMAL) for token, i in tokenizer.vocab.items()}
    names |= {i: (text, CONTROL) for text, i in tokenizer.special_tokens.items()}
    merges = [f"{printable(left)} {printable(right)}" for left, right in tokenizer.merges]
    return {"model": "gpt2", "pre": "gpt-2"} | _listed(names) | {"merges": merges}


def _of_sentencepiece(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    texts, scores, kinds = zip(*tokenizer.pieces, strict=True)
    values = {"model": "llama", "pre": "default", "tokens": list(texts), "token_type": list(kinds)}
    return values | {"scores": list(map(float, scores)), "add_space_prefix": tokenizer.space_prefix}


def _of_library(tokenizer: Any) -> dict[str, Any] | None:
    """Of byte-level BPE that splits as one of llama.cpp's families does; None for anything else."""
    from llmfast.tokenizers.gguf import SPLITTINGS

    library = tokenizer._tokenizer
    document = json.loads(library.to_str())
    model = document["model"]
    found = _patterns(document["pre_tokenizer"]), document["normalizer"] == {"type": "NFC"}, model.get("ignore_merges")
    name = next((n for n, s in SPLITTINGS.items() if (s.patterns, s.composes, s.ignore_merges) == found), None)
    if model["type"] != "BPE" or name is None or (document["normalizer"] and not found[1]):
        return None
    names = {i: (text, NORMAL) for text, i in library.get_vocab(with_added_tokens=True).items()}
    for i, added in library.get_added_tokens_decoder().items():
        names[i] = added.content, CONTROL if added.special else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {"model": "gpt2", "pre": name} | _listed(names) | {"merges": merges}


def _patterns(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...]:
    """By which patterns a pre-tokenizer of the library splits, ending in bytes; empty for one of another kind."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    patterns = []
    for step in steps:
        kind = step.get("type")
        if kind == "Digits" and step["individual_digits"]:
            patterns.append(r"\p{N}")
        elif kind == "Split" and step["behavior"] == "Isolated" and not step["invert"] and "Regex" in step["pattern"]:
            patterns.append(step["pattern"]["Regex"])
        elif kind == "ByteLevel" and not step["add_prefix_space"]:
            patterns += [GPT2_SPLIT_PATTERN] if step["use_regex"] else []
        else:
            return ()
    return tuple(patterns) if steps[-1].get("type") == "ByteLevel" else ()


def _listed(names: Mapping[int, tuple[str, int]]) -> dict[str, Any]:
    """Texts and types by id; ids that are not used are tokens that no text becomes."""
    listed = [names.get(i, (f"[unused {i}]", UNUSED)) for i in range(max(names) + 1)]
    return {"tokens": [text for text, _ in listed], "token_type": [kind for _, kind in listed]}
