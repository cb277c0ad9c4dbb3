"""Records of any of the usual forms as what a model sees, and which of its tokens it is to learn.

    {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …]}
    {"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}, …]}        (ShareGPT)
    {"instruction": …, "input": …, "output": …}
    {"prompt": …, "completion": …}                                       no chat: the one continues the other

Chats are written by the model's own template. What the assistant says counts, and the token that ends its turn; what
others say, and what the template adds, is only seen. Text is cut into tokens where the assistant's turns begin, as it
is when the model answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmfast.chat.template import ChatTemplate, check_messages
from llmfast.tokenizers import Tokenizer
from llmfast.tokenizers.protocol import encodable

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
FORMS = (
    '"messages", "conversations", "instruction" and "output", "prompt" and "completion", or "text"'  # as errors say it
)
# How a model without a template of its own is spoken to. An end-of-text ends a turn of the assistant.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'].capitalize() + '\\n' + message['content'].strip() }}"
    "{{ '<|endoftext|>' if message['role'] == 'assistant' else '' }}"
    "{{ '\\n\\n' if not loop.last or message['role'] != 'assistant' else '' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Turns:
    """Tokens, and which of them are to be predicted."""

    ids: list[int]
    counts: list[bool]


def form_of(fields: Mapping[str, Any]) -> str | None:
    """ "preference", "chat", "completion" or "text", by the names of a record's fields; None where it is none."""
    if {"chosen", "rejected"} <= fields.keys():
        return "preference"
    if "messages" in fields or "conversations" in fields or {"instruction", "output"} <= fields.keys():
        return "chat"
    if {"prompt", "completion"} <= fields.keys():
        return "completion"
    return "text" if "text" in fields else None


def messages_of(fields: Mapping[str, Any], system: str = "") -> list[dict[str, Any]]:
    """The messages of a record whose form is "chat", the last of which is the assistant's. `ValueError` says what is
    wrong with it. `system` goes before a chat that has no system message."""
    if "messages" in fields:
        messages = fields["messages"]
        check_messages(messages)
        messages = [dict(message) for message in messages]
    elif "conversations" in fields:
        messages = [_from_sharegpt(turn) for turn in _list(fields["conversations"], "conversations")]
    else:
        asked = [_text(fields, "instruction"), _text(fields, "input") if fields.get("input") else ""]
        messages = [
            {"role": "user", "content": "\n\n".join(part for part in asked if part)},
            {"role": "assistant", "content": _text(fields, "output")},
        ]
        if isinstance(fields.get("system"), str) and fields["system"]:
            messages.insert(0, {"role": "system", "content": fields["system"]})
    check_messages(messages)
    if system and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": system})
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()  # nobody answers it: there is nothing to learn
    if not messages:
        raise ValueError("the assistant says nothing in it")
    if not any(str(m.get("content") or "").strip() for m in messages if m["role"] == "assistant"):
        raise ValueError("what the assistant says is empty")
    return [m | {"content": encodable(m["content"])} if isinstance(m.get("content"), str) else m for m in messages]


def encode_chat(template: ChatTemplate, messages: Sequence[Mapping[str, Any]]) -> Turns:
    """The tokens of a chat, of which those of the assistant's turns count, up to the token that ends each.

    A template may write an earlier turn in another way than the last (without its thoughts, say): what it would not
    write so again does not count. `ValueError` where that is so for the last turn.
    """
    tokenizer = template.tokenizer
    whole, special = template.render(messages, add_generation_prompt=False)
    spans: list[tuple[int, int]] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = template.render(messages[:number], add_generation_prompt=True).text if number else ""
        start, last = len(before), number == len(messages) - 1
        if not whole.startswith(before):
            if last:
                raise ValueError(
                    "the chat template writes what comes before the last answer otherwise than before others"
                )
            continue
        end = _end(whole, special, start, tokenizer)
        if end is None:  # no token ends a turn: it reaches as far as the chat without what follows
            after = template.render(messages[: number + 1], add_generation_prompt=False).text
            end = len(after) if whole.startswith(after) else start
        if end > start:
            spans.append((start, end))
    ids: list[int] = []
    counts: list[bool] = []
    at = 0
    for start, end in [*spans, (len(whole), len(whole))]:
        for first, stop, counted in ((at, start, False), (start, end, True)):
            names = [(a - first, b - first) for a, b in special if first <= a and b <= stop]
            tokens = tokenizer.encode(whole[first:stop], names)
            ids += tokens
            counts += [counted] * len(tokens)
        at = end
    return Turns(ids, counts)


def encode_completion(tokenizer: Tokenizer, fields: Mapping[str, Any]) -> Turns:
    """A prompt, and what counts: the text that continues it, to its end-of-text."""
    prompt = tokenizer.encode(encodable(_text(fields, "prompt")))
    rest = tokenizer.encode(encodable(_text(fields, "completion")))
    if not rest:
        raise ValueError("its completion is empty")
    if tokenizer.end_of_text is not None:
        rest.append(tokenizer.end_of_text)
    if not prompt and tokenizer.end_of_text is not None:
        prompt = [tokenizer.end_of_text]
    if not prompt:
        raise ValueError("its prompt is empty, and the tokenizer has no end-of-text to begin with")
    return Turns(prompt + rest, [False] * len(prompt) + [True] * len(rest))


def _end(text: str, special: Sequence[tuple[int, int]], start: int, tokenizer: Tokenizer) -> int | None:
    """Where the first token that ends a turn stops, from `start` on: what is said holds none."""
    ends = (b for a, b in special if a >= start and tokenizer.special_tokens.get(text[a:b]) in tokenizer.end_tokens)
    return next(ends, None)


def _from_sharegpt(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or turn.get("from") not in SPEAKERS or not isinstance(turn.get("value"), str):
        raise ValueError(
            f'a turn of a conversation must have a "from" ({", ".join(SPEAKERS)}) and a "value", got {turn!r:.80}'
        )
    return {"role": SPEAKERS[turn["from"]], "content": turn["value"]}


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"its {name} must be a list of at least one turn, got {value!r:.80}")
    return value


def _text(fields: Mapping[str, Any], name: str) -> str:
    if not isinstance(fields.get(name), str):
        raise ValueError(f"its {name} must be text, got {fields.get(name)!r:.80}")
    return str(fields[name])
