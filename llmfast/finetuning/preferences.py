"""Direct preference optimisation (DPO: Rafailov et al., 2023): of two answers, the better is to become the likelier.

    margin = β ((log p(chosen) - log p₀(chosen)) - (log p(rejected) - log p₀(rejected)))      loss = -log σ(margin)

p is the model with its adapters, p₀ without them: what it was before needs no second copy. A pair is two rows of a
batch, side by side, each with the answer's tokens as targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llmfast import ops
from llmfast.chat.template import ChatTemplate
from llmfast.finetuning import lora
from llmfast.finetuning.conversations import encode_chat, encode_completion, messages_of
from llmfast.finetuning.examples import Example, ExampleBatches, ExampleLoader, following, padded
from llmfast.models import LanguageModel
from llmfast.tokenizers import Tokenizer
from llmfast.training.dataset import IGNORED


def encode(
    fields: Mapping[str, Any], tokenizer: Tokenizer, template: ChatTemplate | None, system: str, place: str
) -> tuple[Example, Example]:
    """The chosen and the rejected answer to one prompt: texts, which continue it, or lists of messages, which the chat
    template writes after those of the prompt. Of each the last turn alone counts. `ValueError` says what is wrong."""
    made = []
    for name in ("chosen", "rejected"):
        if isinstance(fields.get(name), list):
            if template is None:
                raise ValueError("this model has no chat template, and a chat can't be written without one")
            before = fields.get("prompt") or []
            before = [{"role": "user", "content": before}] if isinstance(before, str) else before
            turns = encode_chat(template, messages_of({"messages": [*before, *fields[name]]}, system))
        else:
            turns = encode_completion(tokenizer, {"prompt": fields.get("prompt"), "completion": fields.get(name)})
        made.append(last_turn(following(turns.ids, turns.counts, place)))
    if made[0].ids.tobytes() == made[1].ids.tobytes() and made[0].targets.tobytes() == made[1].targets.tobytes():
        raise ValueError("its chosen and its rejected answer are the same")
    return made[0], made[1]


def last_turn(example: Example) -> Example:
    """Only the last run of targets counts."""
    counted = example.targets != IGNORED
    before = [place for place in range(1, len(counted)) if counted[place] and not counted[place - 1]]
    targets = example.targets.copy()
    targets[: before[-1] if before else 0] = IGNORED
    return Example(example.ids, targets, example.place)


class PairLoader(ExampleLoader):
    """`ExampleLoader` of pairs: `batch_size` pairs a batch, in twice as many rows."""

    def __init__(self, pairs: Sequence[tuple[Example, Example]], *arguments: Any, **more: Any):
        super().__init__([longer(pair) for pair in pairs], *arguments, **more)
        self.pairs = pairs

    def rows(self, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        return padded([example for index in chosen for example in self.pairs[index]], self.padding, self.most)


def longer(pair: tuple[Example, Example]) -> Example:
    return max(pair, key=lambda example: len(example.ids))


def margins(model: LanguageModel, ids: Tensor, targets: Tensor) -> Tensor:
    """By how much more than before each pair's chosen answer is likelier than its rejected one: (rows / 2,) float32."""
    with torch.no_grad(), lora.switched_off(model):
        before = log_probabilities(model, ids, targets)
    gained = (log_probabilities(model, ids, targets) - before).view(-1, 2)
    return gained[:, 0] - gained[:, 1]


def log_probabilities(model: LanguageModel, ids: Tensor, targets: Tensor) -> Tensor:
    """Of all targets of a row together: (rows,) float32."""
    hidden, weight, sums = model.hidden(ids), model.lm_head.weight, []
    for row, counted in enumerate(targets != IGNORED):
        chosen = counted.nonzero().squeeze(1)
        mean = ops.linear_cross_entropy(hidden[row].index_select(0, chosen), weight, targets[row, chosen])
        sums.append(-mean * len(chosen))
    return torch.stack(sums)


def loss(model: LanguageModel, ids: Tensor, targets: Tensor, beta: float) -> Tensor:
    return -F.logsigmoid(beta * margins(model, ids, targets)).mean()


@torch.no_grad()
def figures(
    model: LanguageModel, pairs: Sequence[tuple[Example, Example]], beta: float, padding: int
) -> dict[str, float]:
    """The mean loss, the share of pairs whose margin is positive, and the mean margin, β included."""
    model.eval()
    batches = ExampleBatches([longer(pair) for pair in pairs], padding)
    found = []
    for group in batches.groups:
        ids, targets = padded([example for index in group for example in pairs[index]], padding)
        found.append(beta * margins(model, ids.to(model.device), targets.to(model.device)))
    model.train()
    margin = torch.cat(found)
    return {
        "loss": float(-F.logsigmoid(margin).mean()),
        "accuracy": float((margin > 0).float().mean()),
        "margin": float(margin.mean()),
    }
