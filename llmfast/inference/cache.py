"""The KV cache: the keys and values of the tokens so far, in memory that is allocated once."""

from __future__ import annotations

import torch
from torch import Tensor

from llmfast.models import ModelConfig


class KVCache:
    """Keys and values of `batch` sequences in every layer, each (blocks, B, Hkv, capacity, D), filled from the front.

    Sequences may have different lengths. A forward pass appends T tokens to each in three moves:

        cache.extend(T)                       # or extend(T, lengths): how many of the T each sequence really has
        keys, values = cache.append(layer, k, v)      # in every block; (B, Hkv, T, D) in, (…, longest, D) out
        ops.causal_attention(q, keys, values, kv_lengths=cache.kv_lengths)

    Ragged tokens are padded on the left, so that every sequence's last token is the last query, as
    `causal_attention` expects; in the cache they stand without the padding.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int = 1,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.capacity = config.context if capacity is None else capacity
        shape = (config.blocks, batch, config.key_heads, self.capacity, config.head_dim)
        # Zeros, not uninitialised memory: padding is read (and ignored), and must be finite.
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.longest = 0  # the longest of `lengths`, known on the host
        self.ragged = False
        self._new_tokens = 0
        self._positions = self.lengths.unsqueeze(1)  # of the new tokens, (B, new tokens)

    @property
    def kv_lengths(self) -> Tensor | None:
        """`lengths` for `causal_attention`, or None while all sequences are equally long."""
        return self.lengths if self.ragged else None

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def clear(self) -> None:
        """Forgets every token; the memory stays, and is zero again: what a text left there may not be finite."""
        for store in (self.keys, self.values):
            store[:, :, :, : self.longest].zero_()
        self.lengths.zero_()
        self.longest = 0
        self.ragged = False

    def extend(self, tokens: int, lengths: list[int] | None = None) -> Tensor:
        """Makes room for `tokens` new tokens a sequence and returns their positions, (B, tokens) int64.

        `lengths` gives how many of them each sequence really has, the others being padding on the left (only into an
        empty cache). `ValueError` when the cache is too small.
        """
        if self.longest + tokens > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, {self.longest} + {tokens} do not fit")
        if lengths is not None and self.longest:
            raise ValueError("tokens of different lengths can only be added to an empty cache")
        self._new_tokens = tokens
        self.longest += tokens
        if lengths is None:
            self.lengths += tokens
        else:
            self.lengths.copy_(torch.tensor(lengths))
            self.ragged = min(lengths) != tokens
        steps = torch.arange(-tokens, 0, device=self.lengths.device)
        self._positions = (self.lengths.unsqueeze(1) + steps).clamp_(min=0)
        return self._positions

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one layer's new keys and values, (B, Hkv, T, D), and returns views of all of them."""
        for store, new in ((self.keys[layer], k), (self.values[layer], v)):
            if not self.ragged:
                store[:, :, self.longest - self._new_tokens : self.longest] = new
            elif self._new_tokens < self.longest:
                # As many tokens for every sequence, each after its own last one.
                index = self._positions.view(-1, 1, self._new_tokens, 1).expand_as(new)
                store.scatter_(2, index, new.to(store.dtype))
            else:
                # Position p of a sequence is token p + padding; what lies past its end is never looked at.
                padding = (self._new_tokens - self.lengths).unsqueeze(1)
                source = (torch.arange(self._new_tokens, device=store.device) + padding).clamp_(
                    max=self._new_tokens - 1
                )
                index = source.view(source.shape[0], 1, -1, 1).expand_as(new)
                store[:, :, : self._new_tokens] = new.gather(2, index)
        return self.keys[layer, :, :, : self.longest], self.values[layer, :, :, : self.longest]


class StaticKVCache(KVCache):
    """A cache whose steps always have the same shape, for a decode step that is recorded once and replayed.

    It is filled as any other; a step then appends one token to every sequence at a place that only the device knows,
    and attention reads the whole memory up to `lengths`. The host adds each step to `longest` itself: in a replay none
    of this code runs.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int = 1,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(config, batch, capacity, device, dtype)
        self._stepping = False

    @property
    def kv_lengths(self) -> Tensor | None:
        return self.lengths if self._stepping else super().kv_lengths

    def extend(self, tokens: int, lengths: list[int] | None = None) -> Tensor:
        """As in `KVCache` with `lengths`, which starts over; without them one token more, whatever the lengths are."""
        self._stepping = lengths is None
        if not self._stepping:
            return super().extend(tokens, lengths)
        if tokens != 1:
            raise ValueError(f"a static cache takes one token a step, got {tokens}")
        # The limits hold for steps without a use too: those that warm up, and one that runs ahead of a text's end.
        self._positions = self.lengths.clamp(max=self.capacity - 1).unsqueeze(1)
        self.lengths.add_(1).clamp_(max=self.capacity)
        return self._positions

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if not self._stepping:
            return super().append(layer, k, v)
        index = self._positions.view(-1, 1, 1, 1).expand_as(k)
        for store, new in ((self.keys[layer], k), (self.values[layer], v)):
            store.scatter_(2, index, new.to(store.dtype))
        return self.keys[layer], self.values[layer]
