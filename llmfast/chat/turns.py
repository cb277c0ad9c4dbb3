"""The turns of a chat that fit a model's context."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

M = TypeVar("M", bound=Mapping[str, Any])


def fits(ids: list[int], reply: int, context: int) -> bool:
    """Whether a chat leaves room for a reply of so many tokens; half the context always is enough."""
    return len(ids) + min(reply, context // 2) <= context


def fitting(messages: Sequence[M], encode: Callable[[Sequence[M]], list[int]], context: int, reply: int) -> list[int]:
    """The ids of a chat, or where it does not fit those of what `without_oldest` leaves of it, with a warning."""
    ids = encode(messages)
    if not fits(ids, reply, context):
        kept, ids = without_oldest(messages, encode, context)
        if len(kept) < len(messages):
            warn_of_dropped(context)
    return ids


def without_oldest(
    messages: Sequence[M], encode: Callable[[Sequence[M]], list[int]], context: int
) -> tuple[list[M], list[int]]:
    """What the system says and as many of the newest turns as fill half the context, at least the last; and its ids.

    A turn is what a user says and all up to the next. Half, so that the next turns find room, and the keys and values
    of what stays are used again. `ValueError` where the last turn alone is too long.
    """
    first = next((i for i, message in enumerate(messages) if message["role"] not in ("system", "developer")), 0)
    starts = [i for i, message in enumerate(messages) if i >= first and message["role"] == "user"] or [first]
    for start in starts:
        kept = [*messages[:first], *messages[start:]]
        ids = encode(kept)
        if len(ids) <= context // 2:
            break
    if len(ids) > context:
        raise ValueError(f"the last turn has {len(ids)} tokens, and the model's context only {context}: shorten it")
    return kept, ids


def warn_of_dropped(context: int) -> None:
    warnings.warn(
        f"the chat outgrew the context of {context} tokens; the model no longer sees its oldest turns", stacklevel=4
    )
