"""From logits to the next token: small pure functions on (B, V) logits, and the settings that combine them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmfast.inference.arguments import is_finite, whole_number
from llmfast.inference.constraint import Constraint
from llmfast.inference.finite import are_finite, check_chosen
from llmfast.inference.generation import Observer
from llmfast.threads import fork_safe_torch

RULED_OUT = torch.finfo(torch.float32).min  # a logit without a chance; not -inf, which is a sign of a broken model
MOST_BIAS = 1e4


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is chosen. `ValueError` names a setting that is out of range."""

    temperature: float = 0.8  # 0 is greedy: always the likeliest token
    top_k: int | None = None  # only the k likeliest tokens
    top_p: float | None = None  # only the likeliest tokens that together have probability p (nucleus sampling)
    min_p: float | None = None  # only tokens at least min_p times as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1: tokens that are already there become less likely
    logit_bias: Mapping[int, float] | None = None  # id of a token -> what its logit gets more; -inf rules it out

    def __post_init__(self) -> None:
        if not (is_finite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be a number of at least 0, got {self.temperature!r}")
        if self.top_k is not None:
            object.__setattr__(self, "top_k", whole_number("top_k", self.top_k, least=1))
        if self.top_p is not None and not (is_finite(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}")
        if self.min_p is not None and not (is_finite(self.min_p) and 0 <= self.min_p <= 1):
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p!r}")
        if not (is_finite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(f"repetition_penalty must be a number above 0, got {self.repetition_penalty!r}")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise ValueError(f"logit_bias must be a number for each of some token ids, got {self.logit_bias!r:.80}")
            for token, bias in self.logit_bias.items():
                whole_number("logit_bias must be of token ids, each of which", token, least=0)
                if bias != -math.inf and not (is_finite(bias) and abs(bias) <= MOST_BIAS):
                    raise ValueError(f"logit_bias must be numbers up to {MOST_BIAS:.0f}, or -inf, got {bias!r}")
            object.__setattr__(self, "logit_bias", dict(self.logit_bias))


@dataclass(frozen=True)
class Sampler:
    """How the tokens of one text, or of a batch of B, are chosen: by `settings`, among the first `vocabulary` tokens.

    `generators`, one a row, give the random numbers (None where nothing is drawn). `seen` (B, vocabulary) bool marks
    the tokens that a repetition penalty applies to, and is kept up to date; None where there is no penalty.
    `constraints`, one a row, say which tokens may come, and hear of those that do. `observer` notes how likely they
    were.
    """

    settings: SamplingSettings
    vocabulary: int
    generators: list[torch.Generator] | None = None
    seen: Tensor | None = None
    constraints: Sequence[Constraint] | None = None
    observer: Observer | None = None
    bias: tuple[Tensor, Tensor] | None = None  # ids and what their logits get more, of the settings

    @classmethod
    def of(
        cls,
        settings: SamplingSettings,
        vocabulary: int,
        seed: int | None,
        rows: list[list[int]],
        device: torch.device,
        constraints: Sequence[Constraint] | None = None,
        observer: Observer | None = None,
    ) -> Sampler:
        """For texts that begin with `rows`. Row i draws from `seed` + i; without a seed torch's generator gives one.

        `ValueError` for a bias of a token that is not in the vocabulary.
        """
        generators = row_generators(seed, len(rows)) if settings.temperature > 0 else None
        seen, bias = None, None
        if settings.repetition_penalty != 1:
            seen = torch.zeros(len(rows), vocabulary, dtype=torch.bool, device=device)
            for number, row in enumerate(rows):
                seen[number, row] = True
        if settings.logit_bias:
            if (last := max(settings.logit_bias)) >= vocabulary:
                raise ValueError(f"logit_bias has token {last}, and the vocabulary only {vocabulary}")
            ids, values = [*settings.logit_bias], [*settings.logit_bias.values()]
            bias = (torch.tensor(ids, device=device), torch.tensor(values, dtype=torch.float32, device=device))
        return cls(settings, vocabulary, generators, seen, constraints, observer, bias)

    @property
    def recordable(self) -> bool:
        """Whether a CUDA graph can choose so, which knows the settings only."""
        return self.constraints is None and self.observer is None and self.bias is None

    def choose(self, logits: Tensor) -> Tensor:
        """(B, V) logits -> (B,) int64. `NonFiniteLogits` where they are not finite."""
        with fork_safe_torch():
            logits = self.possible(logits[:, : self.vocabulary])
            tokens = next_token(logits, self.settings, self.generators, self.seen)
        self.accept(tokens)
        if self.seen is not None:
            self.seen.scatter_(1, tokens.unsqueeze(1), True)
        return tokens

    def possible(self, logits: Tensor) -> Tensor:
        """The logits (B, V), the least number there is for tokens that a constraint rules out."""
        logits = self.biased(logits)
        if self.constraints is None:
            return logits
        allowed = torch.stack([constraint.allowed() for constraint in self.constraints]).to(logits.device)
        return logits.float().masked_fill(~allowed[:, : logits.shape[1]], RULED_OUT)

    def biased(self, logits: Tensor) -> Tensor:
        """The logits (B, V) and what some of them get more."""
        if self.bias is None:
            return logits
        ids, more = self.bias
        return logits.float().index_copy(1, ids, (logits[:, ids].float() + more).clamp(min=RULED_OUT))

    def masks(self) -> Tensor | None:
        """Which tokens the constraints allow, a bit each: (B, words) int32, or None where there are none."""
        return None if self.constraints is None else torch.stack([each.mask() for each in self.constraints])

    def accept(self, tokens: Tensor) -> None:
        """Tells the constraints what was chosen, (B,) int64."""
        for constraint, token in zip(self.constraints or (), tokens.tolist(), strict=self.constraints is not None):
            constraint.accept(token)


def row_generators(seed: int | None, rows: int) -> list[torch.Generator]:
    """On the CPU, wherever the model is: one number a token, and the same ones everywhere."""
    if seed is None:
        seed = int(torch.randint(2**62, (1,)))  # torch.manual_seed makes this repeatable too
    return [torch.Generator().manual_seed((seed + row) % 2**63) for row in range(rows)]


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divides the positive logits of the tokens marked in `seen` (B, V) by `penalty`, multiplies the negative ones
    (Keskar et al., 2019)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf for all but the `k` largest logits of each row (more where the k-th is tied)."""
    if k >= logits.shape[-1]:
        return logits
    kth = torch.topk(logits, k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < kth, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """-inf for all but the smallest set of likeliest tokens with probability at least `p` (Holtzman et al., 2019)."""
    if p == 1:
        return logits
    ordered, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    probability = torch.softmax(ordered, dim=-1)
    before = probability.cumsum(-1) - probability  # of all likelier tokens
    p = max(p, torch.finfo(torch.float32).tiny)  # float32 rounds less to zero, and then the likeliest would go too
    drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(drop, -math.inf)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """-inf for tokens less than `min_p` times as likely as the likeliest (Nguyen et al., 2024)."""
    if min_p == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -math.inf)


def next_token(
    logits: Tensor,
    settings: SamplingSettings,
    generators: list[torch.Generator] | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """Chooses one token a row: (B, V) logits -> (B,) int64.

    Every row draws from a generator of its own, so that a row's text does not depend on its neighbours, and one number
    a token, so that a seed gives the same text on every path that computes the same logits. `seen` (B, V) marks the
    tokens that the repetition penalty applies to. `NonFiniteLogits` where logits are not finite.
    """
    uniform = None if settings.temperature == 0 else uniform_numbers(len(logits), generators, logits.device)
    tokens = choose(logits, settings, uniform, seen)
    check_chosen(tokens)
    return tokens


def choose(logits: Tensor, settings: SamplingSettings, uniform: Tensor | None, seen: Tensor | None = None) -> Tensor:
    """`next_token` from numbers that are already drawn, (B,) in [0, 1), or None to be greedy.

    It never waits for the device, so that a CUDA graph can record it; a row of logits that are not finite gives -1.
    """
    logits = logits.float()
    finite = are_finite(logits)
    if settings.repetition_penalty != 1 and seen is not None:
        logits = apply_repetition_penalty(logits, seen, settings.repetition_penalty)
    if settings.temperature == 0:
        return torch.where(finite, logits.argmax(-1), -1)
    # The likeliest token has logit 0 from here on: a tiny temperature can't overflow to infinity. Nor may it be
    # rounded to zero, as float32 does below its smallest normal number.
    temperature = max(settings.temperature, torch.finfo(torch.float32).tiny)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if settings.top_k is not None:
        logits = keep_top_k(logits, settings.top_k)
    if settings.top_p is not None:
        logits = keep_top_p(logits, settings.top_p)
    if settings.min_p is not None:
        logits = keep_min_p(logits, settings.min_p)
    assert uniform is not None
    return torch.where(finite, draw(torch.softmax(logits, dim=-1), uniform), -1)


def uniform_numbers(rows: int, generators: list[torch.Generator] | None, device: torch.device) -> Tensor:
    """One number in [0, 1) for each row, from its own generator or from torch's: (rows,) float64 on `device`."""
    if generators is None:
        return torch.rand(rows, dtype=torch.float64, device=device)
    if len(generators) != rows:
        raise ValueError(f"{rows} rows need as many generators, got {len(generators)}")
    return torch.cat([torch.rand(1, generator=g, dtype=torch.float64, device=g.device) for g in generators]).to(device)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The first token at which the cumulative probability exceeds `uniform` (B,): (B, V) -> (B,) int64.

    -1 where probabilities are not finite, as after a repetition penalty that overflows.
    """
    sums = probabilities.double().cumsum(-1)
    total = sums[:, -1:]
    tokens = torch.searchsorted(sums, uniform.unsqueeze(1) * total, right=True)
    last = (sums < total).sum(-1, keepdim=True)  # the last that can be: rounding may carry the product to the total
    tokens = torch.minimum(tokens, last).squeeze(1)
    return torch.where(total.squeeze(1) < math.inf, tokens, -1)
