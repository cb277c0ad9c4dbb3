"""A classifier's head: what it reads of a text, and how it begins.

A text's features are its last hidden states: that of the last token, which alone has seen all others, the mean over all
tokens, or both side by side. The head is a matrix (labels, features) that they are multiplied by.

It begins as the best one for the model as it is, by logistic regression on features computed once. What is trained
with it then starts from what the model knows already, instead of bending that to a random head (Kumar et al., 2022).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llmfast.finetuning.examples import Example
from llmfast.models import LanguageModel, ModelConfig
from llmfast.training.dataset import IGNORED

POOLINGS = ("both", "last", "mean")
# The strengths of the penalty that are tried: of squared weights, beside features of mean square 1 and a mean loss.
PENALTIES = (3e-3, 1e-2, 3e-2, 1e-1)
MOST_FITTED = 16_384  # texts: more tell a matrix this small little


def width(config: ModelConfig, pooling: str) -> int:
    """How many features a text has."""
    return config.width * (2 if pooling == "both" else 1)


def add_head(model: LanguageModel, labels: int, pooling: str) -> None:
    """Gives the model a head `score` (Hugging Face's name for it), drawn from torch's generator."""
    head = nn.Linear(width(model.config, pooling), labels, bias=False)
    nn.init.normal_(head.weight, std=0.02)
    model.score = head.to(model.device)


def ends(targets: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of `targets` (rows, width) that have one, and where their last one is: at the last token of a text."""
    counted = targets != IGNORED
    rows = counted.any(dim=1).nonzero().squeeze(1)
    return rows, targets.shape[1] - 1 - counted[rows].flip(1).int().argmax(dim=1)


def features(model: LanguageModel, ids: Tensor, targets: Tensor, pooling: str) -> tuple[Tensor, Tensor]:
    """Of the rows that have a target, that is of each text, its features (texts, features) and its class (texts,)."""
    hidden, (rows, at) = model.hidden(ids), ends(targets)
    last, classes = hidden[rows, at], targets[rows, at]
    if pooling == "last":
        return last, classes
    text = torch.arange(ids.shape[1], device=ids.device) <= at.unsqueeze(1)  # and not what pads the row
    sums = torch.einsum("rtw,rt->rw", hidden[rows].float(), text.float())
    mean = (sums / (at.unsqueeze(1) + 1)).to(hidden.dtype)
    return mean if pooling == "mean" else torch.cat([last, mean], dim=1), classes


def logits(model: LanguageModel, ids: Tensor, targets: Tensor, pooling: str) -> tuple[Tensor, Tensor]:
    """The logits (texts, labels) float32 and the classes (texts,) of the same."""
    score = model.score
    assert isinstance(score, nn.Linear)
    found, classes = features(model, ids, targets, pooling)
    return (found @ score.weight.t()).float(), classes


@torch.no_grad()
def features_of(model: LanguageModel, batches: Sequence[tuple[Tensor, Tensor]], pooling: str) -> tuple[Tensor, Tensor]:
    """The features (texts, features) float32 and the classes (texts,) of all batches."""
    device = model.device
    parts = [features(model, batch[0].to(device), batch[1].to(device), pooling) for batch in batches]
    return torch.cat([found.float() for found, _ in parts]), torch.cat([classes for _, classes in parts])


def some_of(examples: Sequence[Example]) -> Sequence[Example]:
    """At most `MOST_FITTED`, spread over all: files may be sorted by their labels."""
    return examples[:: max(1, -(-len(examples) // MOST_FITTED))]


def fitted(x: Tensor, classes: Tensor, labels: int, penalty: float) -> Tensor:
    """The head (labels, features) float32 of least mean cross-entropy plus `penalty` / 2 times the squares of its
    weights, where each feature of x (texts, features) is scaled to a mean square of 1: multinomial logistic regression,
    by L-BFGS."""
    size = x.square().mean(dim=0).sqrt().clamp(min=1e-6)
    scaled = x / size
    weight = torch.zeros(labels, x.shape[1], device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        loss = nn.functional.cross_entropy(scaled @ weight.t(), classes) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    return weight.detach() / size


def best_fitted(train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor] | None, labels: int) -> Tensor:
    """The fitted head whose penalty has the least loss on what is held out; of the middle one where nothing is."""
    if held_out is None:
        return fitted(*train, labels, PENALTIES[len(PENALTIES) // 2])
    heads = [fitted(*train, labels, penalty) for penalty in PENALTIES]
    x, classes = held_out
    return min(heads, key=lambda head: float(nn.functional.cross_entropy(x @ head.t(), classes)))
