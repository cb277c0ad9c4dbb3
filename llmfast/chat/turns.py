"""The turns of a chat that fit a model's context."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def fitting(
    messages: Sequence[Mapping[str, Any]],
    encode: Callable[[Sequence[Mapping[str, Any]]], list[int]],
    context: int,
    reply: int,
) -> list[int]:
    """The ids of a chat, or where it leaves no room for a reply of so many tokens (half the context at most), those of
    what `without_oldest` leaves of it, with a warning. `ValueError` where the last turn alone is too long."""
    ids = encode(messages)
    if len(ids) + min(reply, context // 2) <= context:
        return ids
    kept, ids = without_oldest(messages, encode, context)
    if len(kept) < len(messages):
        warn_of_dropped(context)
    return ids


def without_oldest(
    messages: Sequence[Mapping[str, Any]],
    encode: Callable[[Sequence[Mapping[str, Any]]], list[int]],
    context: int,
) -> tuple[list[Mapping[str, Any]], list[int]]:
    """What the system says and as many of the newest turns as fill half the context, at least the last; and its ids.

    A turn is what a user says and all up to the next. Half, so that the next turns find room, and the keys and values
    of what stays are used again.
    """
    first = next((i for i, message in enumerate(messages) if message["role"] not in ("system", "developer")), 0)
    beginning, rest = list(messages[:first]), messages[first:]
    starts = [i for i, message in enumerate(rest) if message["role"] == "user"] or [0]
    for start in starts:
        kept = [*beginning, *rest[start:]]
        ids = encode(kept)
        if len(ids) <= context // 2:
            return kept, ids
    if len(ids) > context:
        raise ValueError(
            f"the last turn of the chat has {len(ids)} tokens, the model's context only {context}: shorten it"
        )
    return kept, ids


def warn_of_dropped(context: int) -> None:
    warnings.warn(
        f"the chat outgrew the context of {context} tokens; the model no longer sees its oldest turns", stacklevel=4
    )
