"""A chat as the text that a model was trained on: its own template, and where special tokens stand in it.

What people write must not end their turn or begin another's: a message that says `<|im_end|>` says these characters.
So special tokens are looked for in what the template wrote, and only there. To tell the two apart, characters of
messages that could be a part of a special token's name are replaced by unused ones while the template runs:

    content "a<|im_end|>b"  ->  "a\U000f0000|im_end|>b"  ->  rendered  ->  special tokens are found  ->  put back

Other messages reach the template as they are, and give the same tokens as transformers' `apply_chat_template`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llmfast.chat.sandbox import Sandbox
from llmfast.tokenizers import Tokenizer
from llmfast.tokenizers.protocol import BaseTokenizer

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")  # templates write them as they are
LONGEST_OUTPUT = 1 << 20  # characters that a template may write beyond four times those of the messages
PRIVATE_USE = range(0xF0000, 0xFFFFE)

Message = Mapping[str, Any]


class Rendered(NamedTuple):
    text: str
    special: list[tuple[int, int]]  # the names of special tokens that the template wrote


class ChatTemplate:
    """A template in Jinja's language, and the tokenizer whose special tokens it writes.

    `ValueError` in one line for a template that is not valid.
    """

    def __init__(self, source: str, tokenizer: Tokenizer):
        self._sandbox = Sandbox()
        self._template = self._sandbox.compiled(source)
        self.tokenizer = tokenizer
        self._names = _Names(tokenizer.special_tokens)
        self._variables = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "")
        if isinstance(tokenizer, BaseTokenizer):
            self._variables |= tokenizer.token_names

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any) -> Rendered:
        """The text of the chat, by default up to where the assistant is to go on; `variables` are the template's own.

        `ValueError` in one line for messages that are none, and for a template that fails or takes too much.
        """
        check_messages(messages)
        given = {"messages": list(messages), "tools": None, "documents": None} | variables
        masks = self._names.masks(given)
        longest = LONGEST_OUTPUT + 4 * sum(map(len, _texts(given)))
        named = self._variables | {"add_generation_prompt": add_generation_prompt}
        hidden = self._sandbox.rendered(self._template, named | self._names.hidden(given, masks), longest)
        special = BaseTokenizer.special_spans(self.tokenizer, hidden)  # type: ignore[arg-type]
        back = {ord(mask): letter for letter, mask in masks.items()}
        return Rendered(hidden.translate(back), special)

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any) -> list[int]:
        """The chat's token ids; nothing comes before what the template writes. Errors as in `render`."""
        text, special = self.render(messages, add_generation_prompt, **variables)
        return self.tokenizer.encode(text, special)


def check_messages(messages: Any) -> None:
    """`ValueError` in one line for what is not a list of messages, each with a role and a text (or calls of tools)."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ValueError("a chat must be a list of at least one message, each {'role': …, 'content': …}")
    for message in messages:
        if not isinstance(message, Mapping) or not all(isinstance(key, str) for key in message):
            raise ValueError(f"a message must be a dictionary of 'role' and 'content', got {message!r:.80}")
        if message.get("role") not in ROLES:
            raise ValueError(f"a message's role must be one of {', '.join(ROLES)}, got {message.get('role')!r:.80}")
        if not isinstance(message.get("content"), str) and "tool_calls" not in message:
            raise ValueError(f"a message's content must be a string, got {message.get('content')!r:.80}")


class _Names:
    """The names of special tokens, and which characters of a text could be a part of one."""

    def __init__(self, names: Collection[str]):
        self.names = [name for name in names if name]
        self.beginnings = {name[:n] for name in self.names for n in range(1, len(name))}
        self.ends = {name[-n:] for name in self.names for n in range(1, len(name))}
        self.longest = max(map(len, self.names), default=0)

    def places(self, text: str) -> set[int]:
        """One character of every name in the text, of every beginning of one at its end, and the reverse.

        Templates trim what people write, so the ends count without blanks, too.
        """
        places: set[int] = set()
        for name in self.names:
            at = text.find(name)
            while at >= 0:
                places.add(at)
                at = text.find(name, at + 1)
        start, end = len(text) - len(text.lstrip()), len(text.rstrip())
        for n in range(1, self.longest):
            places |= {stop - n for stop in (end, len(text)) if n <= stop and text[stop - n : stop] in self.beginnings}
            places |= {first for first in (0, start) if first < len(text) and text[first : first + n] in self.ends}
        return places

    def masks(self, value: Any) -> dict[str, str]:
        """For every letter that is to be hidden in `value`, a character that is nowhere in it."""
        letters, used = set(), set()
        for text in _texts(value):
            letters |= {text[place] for place in self.places(text)}
            used |= {letter for letter in text if ord(letter) in PRIVATE_USE}
        unused = (chr(point) for point in PRIVATE_USE if chr(point) not in used)
        return dict(zip(sorted(letters), unused, strict=False))

    def hidden(self, value: Any, masks: Mapping[str, str]) -> Any:
        """The same with these letters replaced, but for roles, which are known."""
        if isinstance(value, str):
            places = self.places(value)
            return "".join([masks[c] if i in places else c for i, c in enumerate(value)]) if places else value
        if isinstance(value, Mapping):
            return {
                self.hidden(key, masks): item if key == "role" and item in ROLES else self.hidden(item, masks)
                for key, item in value.items()
            }
        return [self.hidden(item, masks) for item in value] if isinstance(value, (list, tuple)) else value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
