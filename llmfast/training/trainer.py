"""One optimizer step, and what it takes: model, weights, optimizers, batches.

    batch(step) -> loss, gradients (in `accumulation` parts) -> clip -> optimizer -> weights

Learning rate, batch and dropout are functions of the configuration, the data and the step. A trainer whose weights and
optimizer are put back therefore goes on with the same bits, at the same number of threads and processes.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from llmfast.inference.decoders.native import fastest_float
from llmfast.models import FLOATS, ModelConfig, Shape, create, shaped
from llmfast.training import checkpoints
from llmfast.training.configuration import TrainingConfig
from llmfast.training.dataset import IGNORED, TokenDataset, WindowLoader, rows_of
from llmfast.training.document_loader import DocumentLoader
from llmfast.training.optimizers import load_state, make_optimizers, state_by_name, updates_done
from llmfast.training.processes import Processes
from llmfast.training.schedules import learning_rate
from llmfast.training.weights import MasterWeights
from llmfast.weights.checkpoint import load as load_weights
from llmfast.weights.saving import copy_tokenizer, save

if TYPE_CHECKING:
    from llmfast.training.optimizers import Weights

EVALUATION_TOKENS = 16384  # scored at once


class Diverged(RuntimeError):
    """The loss or the gradient is no longer a number, or the loss has left for good."""


@dataclass(frozen=True)
class Validation:
    """A whole validation split: the mean over its targets, and their number."""

    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        return self.nats / self.tokens


def model_config(config: TrainingConfig, vocab_size: int, end_of_text: int | None) -> ModelConfig:
    """The model's configuration, as its `config.json` will have it."""
    asked = config.model
    shape = Shape(
        vocab_size=vocab_size,
        context=asked.n_positions,
        width=asked.n_embd,
        blocks=asked.n_layer,
        heads=asked.n_head,
        key_heads=asked.n_key_head or None,
        inner_dim=asked.n_inner or None,
        dropout=asked.dropout,
        attention_dropout=asked.attention_dropout,
        tie_word_embeddings=asked.tie_word_embeddings,
        end_of_text=end_of_text,
    )
    return shaped(asked.family, shape)


def best_precision(device: torch.device) -> str:
    """What "auto" means there: bf16 where it is multiplied faster, else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return fastest_float() if device.type == "cpu" else "fp32"


class Trainer:
    """A model in training. `steps_done` counts; `step()` does the next one, on the surrounding choice of backend.

    `config.run.precision` must be resolved ("auto" is not a precision), so that a resumed run has the same.
    """

    def __init__(
        self,
        config: TrainingConfig,
        data: TokenDataset,
        vocab_size: int,
        end_of_text: int | None = None,
        group: Processes | None = None,
    ):
        group = group or Processes()
        run = config.run
        self.config, self.group, self.device = config, group, group.device
        shared = group.world_size * config.data.accumulation
        if config.data.batch_size % shared:
            raise ValueError(
                f"batch_size must be a multiple of accumulation × processes, but {config.data.batch_size} is not of "
                f"{config.data.accumulation} × {group.world_size}"
            )
        T, rows, place = config.model.n_positions, config.data.batch_size, (run.seed, group.rank, group.world_size)
        self.padding = end_of_text or 0
        self.loader: WindowLoader | DocumentLoader
        if config.data.rows == "documents":
            self.loader = DocumentLoader(data, T, rows * (T + 1), *place, end_of_text)
        else:
            self.loader = WindowLoader(data, T, rows, *place)
        torch.manual_seed(run.seed)  # the initial weights are made on the CPU: the same on every device
        model = create(model_config(config, vocab_size, end_of_text)).to(self.device)
        self.model = model.train()
        dtype = FLOATS[run.precision]
        if run.activation_checkpointing:
            for block in model.block_modules:
                block.forward = functools.partial(recomputed, block.forward, use_reentrant=False)
        if group.sharded and run.precision == "fp16":
            raise ValueError("fsdp computes in fp32 or bf16: fp16 would overflow in one process and not in another")
        self.weights: Weights
        if group.sharded:
            from llmfast.training.sharded import ShardedWeights

            self.weights = ShardedWeights(model, dtype, group)
        else:
            self.weights = MasterWeights(model, dtype)
        self.optimizers = make_optimizers(self.weights, config.optimization)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=run.precision == "fp16")
        self._loss = torch.compile(model.loss) if run.compile else model.loss
        self.steps_done = 0

    def step(self) -> tuple[Tensor, Tensor]:
        """The next optimizer step: this process's share of the batch's mean loss, and the gradient's norm.

        The shares of all processes add up to the loss. Both are scalars on the device, not waited for. On a CPU, where
        looking costs nothing, `Diverged` is raised for a gradient that is not finite before it touches the weights.
        """
        ids, targets = self.loader.batch(self.steps_done)
        counts = [int((part != IGNORED).sum()) for part in targets.chunk(self.config.data.accumulation)]
        total = self.group.total(sum(counts))
        if self.config.model.dropout + self.config.model.attention_dropout > 0:
            self._seed_dropout()
        if self.device.type == "cuda":
            ids, targets = (t.pin_memory().to(self.device, non_blocking=True) for t in (ids, targets))
        parts = zip(
            ids.chunk(len(counts)), targets.chunk(len(counts)), (count / max(1, total) for count in counts), strict=True
        )
        loss = torch.zeros((), device=self.device)
        self.weights.zero_gradients()
        for part_ids, part_targets, share in parts:
            if share == 0:  # the mean over nothing is not a number: any target will do, and counts for nothing
                part_targets = part_targets.clamp(min=0)
            part_loss = self._loss(part_ids, part_targets)
            part_loss.backward(self.scaler.scale(torch.tensor(share * self.weights.gradient_scale, device=self.device)))
            self.weights.collect()
            loss += part_loss.detach() * share
        norm = self._update()
        self.steps_done += 1
        return loss, norm

    def _update(self) -> Tensor:
        """Gradients to weights, at this step's learning rate."""
        self.weights.reduce(self.group)
        for optimizer in self.optimizers:
            if self.scaler.is_enabled():
                self.scaler.unscale_(optimizer)
        norm = self.weights.clip(self.config.optimization.clip)
        if self.device.type == "cpu" and not self.scaler.is_enabled() and not math.isfinite(float(norm)):
            raise Diverged(f"the gradient of step {self.steps_done + 1} is not finite")
        lr = self.learning_rate(self.steps_done)
        for optimizer in self.optimizers:
            for parameters in optimizer.param_groups:
                parameters["lr"] = lr
            self.scaler.step(optimizer)  # skips it where fp16 overflowed
        self.scaler.update()
        self.weights.publish()
        return norm

    def _seed_dropout(self) -> None:
        """torch's generator, for this step and this process."""
        words = np.random.SeedSequence([self.config.run.seed, self.steps_done, self.group.rank]).generate_state(2)
        torch.manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)

    def learning_rate(self, step: int) -> float:
        return learning_rate(step, self.config.run.steps, self.config.optimization)

    def evaluate(self, data: TokenDataset) -> Validation:
        """Scores every token of `data` once, in the loader's blocks of at most the context, which share nothing."""
        blocks = sorted(self.loader.blocks(data), key=lambda block: -block[1])  # like lengths together
        rows = max(1, EVALUATION_TOKENS // self.config.model.n_positions)
        batches = [blocks[i : i + rows] for i in range(0, len(blocks), rows)]
        sums = torch.zeros(2, dtype=torch.float64)
        self.model.eval()
        world = self.group.world_size
        with torch.no_grad():
            for first in range(0, len(batches), world):  # as many on every rank, as sharded weights need it
                index = first + self.group.rank
                starts, lengths = zip(*batches[index % len(batches)], strict=True)
                ids, targets = rows_of(data, starts, lengths, lengths[0], self.padding)
                count = int((targets != IGNORED).sum()) if index < len(batches) else 0
                if count == 0:
                    targets = targets.clamp(min=0)
                mean = float(self.model.loss(ids.to(self.device), targets.to(self.device)))
                sums += torch.tensor([mean * count, count], dtype=torch.float64)
        self.model.train()
        nats, tokens = self.group.add_up(sums.to(self.device)).tolist()
        return Validation(nats, int(tokens))

    # --- state ------------------------------------------------------------------------------------------------------

    def full_weights(self) -> dict[str, Tensor]:
        """The float32 weights by their names, whole, in the first process. For all processes to call."""
        if not self.group.sharded:
            return self.weights.state()
        from llmfast.training import sharded

        gathered = {}
        for name, part in self.weights.state().items():
            tensor = sharded.whole(part)
            if self.group.first:
                gathered[name] = tensor
        return gathered

    def checkpoint(self, root: Path, keep: int, tokenizer: Path, extra: dict[str, Any]) -> None:
        """Writes this state below `root` (see `checkpoints`); `extra` goes into its JSON. For all processes to call."""
        config = self.model.config

        def content(directory: Path) -> None:
            optimizer = state_by_name(self.optimizers, self.weights)
            if self.group.sharded:
                from llmfast.training import sharded

                tensors = {sharded.MODEL + name: tensor for name, tensor in self.weights.state().items()}
                tensors |= {sharded.OPTIMIZER + name: tensor for name, tensor in optimizer.items()}
                sharded.write_shards(directory, tensors)
            if not self.group.first:
                return
            if self.group.sharded:
                copy_tokenizer(tokenizer, directory)
            else:
                save(directory, config, self.weights.state(), tokenizer_from=tokenizer)
                checkpoints.save_tensors(directory / checkpoints.OPTIMIZER, optimizer)
            updates = updates_done(self.optimizers, self.steps_done)
            state = {
                "step": self.steps_done,
                "updates": updates,
                "scaler": self.scaler.state_dict(),
                "model": config.to_document(),
            }
            (directory / checkpoints.STATE).write_text(json.dumps(state | extra, indent=2) + "\n", encoding="utf-8")

        checkpoints.write(root, self.steps_done, keep, content, self.group)

    def load(self, directory: Path, state: dict[str, Any]) -> None:
        """Puts back what `checkpoint` wrote, on any number of processes. `ValueError` where it is damaged."""
        if (directory / checkpoints.SHARDS).is_dir():
            from llmfast.training import sharded

            parameters = self.weights.state() if self.group.sharded else None
            model = sharded.read_tensors(directory, sharded.MODEL, parameters)
            optimizer = sharded.read_tensors(directory, sharded.OPTIMIZER, parameters)
        else:
            _, model = load_weights(directory)
            optimizer = checkpoints.load_tensors(directory / checkpoints.OPTIMIZER)
        try:
            self.weights.load(model)
            load_state(self.optimizers, self.weights, optimizer, state["updates"])
        except KeyError as error:
            raise ValueError(f"the checkpoint {directory} is damaged: it lacks {error}") from None
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.steps_done = state["step"]
