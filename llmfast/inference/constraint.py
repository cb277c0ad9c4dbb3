"""Text that has to have a form: JSON of a schema, what a regular expression or a grammar allows.

The library `llguidance` follows the text, and says before every token which may come (and which have to, where there
is no choice). What it rules out has no chance with the sampler.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmfast.tokenizers import Tokenizer

# Blanks as people write JSON, and nowhere else: a small model that may write blanks writes them for ever.
JSON_OPTIONS: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Vocabulary:
    """A tokenizer as `llguidance` reads it, once for all texts. `ValueError` where the library is not installed."""

    def __init__(self, tokenizer: Tokenizer, ends: Collection[int]):
        try:
            import llguidance
        except ImportError:
            raise ValueError(
                'a schema, regex or grammar needs the package llguidance: pip install -e ".[structured]"'
            ) from None
        self.size, self.ends = tokenizer.vocab_size, sorted(ends)
        special = {*tokenizer.special_tokens.values(), *ends}
        # Behind the model's own tokens stands one that ends a text, for a model that has none.
        self.tokens = [b"" if i in special else _bytes_of(tokenizer, i) for i in range(self.size)] + [b""]
        self.tokens = [token or b"\xff<%d>" % i for i, token in enumerate(self.tokens)]
        self.special_token_ids = [*sorted(special), self.size]
        self.bos_token_id, self.eos_token_id = None, self.ends[0] if self.ends else self.size
        self._encode = tokenizer.encode
        bits = np.full(-(-len(self.tokens) // 32) * 32, not self.ends, dtype=bool)
        bits[self.ends] = True
        self.only_ends = torch.from_numpy(np.packbits(bits, bitorder="little").view(np.int32))
        wrapper = llguidance.TokenizerWrapper(self)
        self.library = llguidance.LLTokenizer(wrapper, eos_token=self.ends or [self.size])

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def _bytes_of(tokenizer: Tokenizer, i: int) -> bytes:
    try:
        return tokenizer.decode_bytes([i])
    except ValueError:  # an id that no token has
        return b""


def grammar_of(json_schema: Any = None, regex: str | None = None, grammar: str | None = None) -> str | None:
    """What `Constraint` takes: of a schema (a dictionary, its JSON, or a Pydantic model), a regular expression of the
    whole text, or a grammar in Lark's notation; None for none of them. `ValueError` for several, or for no schema."""
    given = [one for one in (json_schema, regex, grammar) if one is not None]
    if not given:
        return None
    if len(given) > 1:
        raise ValueError("give one of json_schema, regex and grammar, not several")
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise ValueError(
            'a schema, regex or grammar needs the package llguidance: pip install -e ".[structured]"'
        ) from None
    if json_schema is None:
        if not isinstance(given[0], str):
            raise ValueError(f"{'regex' if regex is not None else 'grammar'} must be a string, got {given[0]!r:.80}")
        return LLMatcher.grammar_from_regex(regex) if regex is not None else LLMatcher.grammar_from_lark(given[0])
    if hasattr(json_schema, "model_json_schema"):
        json_schema = json_schema.model_json_schema()
    try:
        schema = json.loads(json_schema) if isinstance(json_schema, str) else json_schema
        if not isinstance(schema, (Mapping, bool)):
            raise ValueError("it should be a JSON object")
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=JSON_OPTIONS)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"json_schema is not a JSON schema: {' '.join(str(error).split())}") from None


class Constraint:
    """What may come next in one text. `ValueError` in one line for a grammar that is not valid."""

    def __init__(self, vocabulary: Vocabulary, grammar: str):
        from llguidance import LLMatcher

        self._vocabulary = vocabulary
        self._matcher = LLMatcher(vocabulary.library, grammar, log_level=0)
        if self._matcher.is_error():
            raise ValueError(f"the text can't have this form: {' '.join(self._matcher.get_error().split())[:300]}")

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        return self._matcher.is_stopped()

    def mask(self) -> Tensor:
        """Which tokens may come next, a bit each, the lowest first: (words,) int32. The ends where a text may end."""
        if self.complete:
            return self._vocabulary.only_ends
        return torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.int32)

    def allowed(self) -> Tensor:
        """The same as bool, of the tokenizer's vocabulary."""
        bits = np.unpackbits(self.mask().numpy().view(np.uint8), bitorder="little")
        return torch.from_numpy(bits[: self._vocabulary.size].astype(bool))

    def accept(self, token: int) -> None:
        """The text goes on with this token."""
        if not self.complete:
            self._matcher.consume_token(token)
            if self._matcher.is_error():
                raise ValueError(f"the text lost its form: {' '.join(self._matcher.get_error().split())[:300]}")

    def forced(self) -> list[int]:
        """The next tokens, where there is no choice."""
        return [] if self.complete else self._matcher.compute_ff_tokens()
