"""Lesson 6, A block."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmfast.lessons.checking import difference


def exercise_1(rms: Callable) -> str | None:
    x, weight, eps = 2 + torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(6)), torch.arange(1.0, 9.0), 0.1

    def normed(square: torch.Tensor) -> torch.Tensor:
        return x / (square + eps).sqrt() * weight

    mean = x.square().mean(-1, keepdim=True)
    mistakes = {
        "the weight is missing": normed(mean) / weight,
        "this takes the sum of squares: the mean is meant": normed(x.square().sum(-1, keepdim=True)),
        "this subtracts the mean first, which is LayerNorm": (x - x.mean(-1, keepdim=True))
        / (x.var(-1, keepdim=True, correction=0) + eps).sqrt()
        * weight,
        "eps is added within the root, not after it": x / (mean.sqrt() + eps) * weight,
        "eps is missing: a token of zeros would be 0 / 0": x / mean.sqrt() * weight,
        "the mean is that of the whole tensor: each token has its own": normed(x.square().mean()),
        "this divides by the mean square: take its root": x / (mean + eps) * weight,
    }
    return difference(rms(x.clone(), weight.clone(), eps), normed(mean), 1e-4, mistakes)


def exercise_2(swiglu_network: Callable) -> str | None:
    generator = torch.Generator().manual_seed(62)
    x, gate, up, down = (torch.randn(*s, generator=generator) for s in ((3, 4), (6, 4), (6, 4), (4, 6)))
    silu = torch.nn.functional.silu
    g, u = x @ gate.T, x @ up.T
    mistakes = {
        "gate and up are exchanged: silu is applied to the gate": (silu(u) * g) @ down.T,
        "silu is applied to the product: it belongs to the gate alone": silu(g * u) @ down.T,
        "gate and up are added: they are multiplied": (silu(g) + u) @ down.T,
        "the result is not narrowed: multiply with down": silu(g) * u,
        "this gates with a sigmoid: silu(x) is x · sigmoid(x)": (g.sigmoid() * u) @ down.T,
    }
    return difference(swiglu_network(x, gate, up, down), (silu(g) * u) @ down.T, 1e-4, mistakes)


def exercise_3(pre_norm: Callable) -> str | None:
    def norm_1(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x + 1

    def norm_2(x: torch.Tensor) -> torch.Tensor:
        return 0.25 * x - 1

    attention, network = torch.sin, torch.cos
    x = torch.linspace(-2, 2, 12).view(1, 3, 4)
    middle = x + attention(norm_1(x))
    post = norm_1(x + attention(x))
    mistakes = {
        "the norms come after the additions: that is post-norm": norm_2(post + network(post)),
        "nothing is added: each branch is added to the stream": network(norm_2(attention(norm_1(x)))),
        "the network reads the block's input: it reads the stream after attention": middle + network(norm_2(x)),
        "the second addition is missing": network(norm_2(middle)),
        "what is added is the normed stream: x itself is not touched by a norm": norm_2(
            norm_1(x) + attention(norm_1(x))
        )
        + network(norm_2(norm_1(x) + attention(norm_1(x)))),
        "the branches are exchanged: attention comes first": x
        + network(norm_1(x))
        + attention(norm_2(x + network(norm_1(x)))),
    }
    return difference(
        pre_norm(x.clone(), norm_1, attention, norm_2, network), middle + network(norm_2(middle)), 1e-4, mistakes
    )
