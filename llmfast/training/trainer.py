"""One optimizer step, and what it takes: model, weights, optimizers, batches.

    batch(step) -> loss, gradients (in `accumulation` parts) -> clip -> optimizer -> weights

Learning rate, batch and dropout are functions of the configuration, the data and the step. A trainer whose weights and
optimizer are put back therefore goes on with the same bits, at the same number of threads and processes.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from llmfast.inference.decoders.native import fastest_float
from llmfast.models import FLOATS, LanguageModel
from llmfast.training import checkpoints
from llmfast.training.configuration import OptimizationSettings, RunSettings
from llmfast.training.dataset import IGNORED
from llmfast.training.optimizers import load_state, make_optimizers, state_by_name, updates_done
from llmfast.training.processes import Processes
from llmfast.training.schedules import learning_rate
from llmfast.training.weights import MasterWeights

if TYPE_CHECKING:
    from llmfast.training.optimizers import Weights


class RunConfig(Protocol):
    """The sections of a configuration that a trainer reads."""

    @property
    def data(self) -> BatchSettings: ...

    @property
    def optimization(self) -> OptimizationSettings: ...

    @property
    def run(self) -> RunSettings: ...


class BatchSettings(Protocol):
    @property
    def batch_size(self) -> int: ...

    @property
    def accumulation(self) -> int: ...


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


def check_shares(config: RunConfig, group: Processes) -> None:
    """`ValueError` where the processes can't share a batch evenly, in as many parts as it is computed in."""
    if config.data.batch_size % (group.world_size * config.data.accumulation):
        raise ValueError(
            f"batch_size must be a multiple of accumulation × processes, but {config.data.batch_size} is not of "
            f"{config.data.accumulation} × {group.world_size}"
        )


def best_precision(device: torch.device) -> str:
    """What "auto" means there: bf16 where it is multiplied faster, else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return fastest_float() if device.type == "cpu" else "fp32"


class Loader(Protocol):
    """Whose batches are a function of the step."""

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The ids of this process at `step` (from 0), (rows, width) int64, and what is to be learned of each: a target
        of the loss, or -100."""
        ...


class WeightFiles(Protocol):
    """How the weights that are trained stand in a checkpoint's directory."""

    def write(self, directory: Path, state: Mapping[str, Tensor]) -> None: ...

    def read(self, directory: Path) -> Mapping[str, Tensor]: ...

    def companions(self, directory: Path) -> None:
        """Writes what goes with them, where processes share them (`sharded`)."""
        ...


Batches = Sequence[tuple[Tensor, Tensor]]  # ids and targets


class Trainer:
    """A model in training. `steps_done` counts; `step()` does the next one, on the surrounding choice of backend.

    What of the model takes gradients is trained, by `loss` (its own by default; the mean over the targets), with
    `kinds` as `MasterWeights` has them. `dropout` says whether the model has any.

    `config.run.precision` must be resolved ("auto" is not a precision), so that a resumed run has the same.
    """

    def __init__(
        self,
        config: RunConfig,
        model: LanguageModel,
        loader: Loader,
        kinds: Mapping[str, str],
        files: WeightFiles,
        group: Processes | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        dropout: bool = False,
    ):
        group = group or Processes()
        run = config.run
        self.config, self.group, self.device = config, group, group.device
        check_shares(config, group)
        self.loader, self.files, self.dropout = loader, files, dropout
        self.model = model.to(self.device).train()
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
            self.weights = MasterWeights(model, dtype, kinds)
        self.optimizers = make_optimizers(self.weights, config.optimization)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=run.precision == "fp16")
        loss = loss or model.loss
        self.loss = loss
        self._compiled_loss = torch.compile(loss) if run.compile else loss
        self.steps_done = 0
        self.tokens_done = 0  # of this start, over all processes, with those that pad rows

    def step(self) -> tuple[Tensor, Tensor]:
        """The next optimizer step: this process's share of the batch's mean loss, and the gradient's norm.

        The shares of all processes add up to the loss. Both are scalars on the device, not waited for. On a CPU, where
        looking costs nothing, `Diverged` is raised for a gradient that is not finite before it touches the weights.
        """
        ids, targets = self.loader.batch(self.steps_done)
        self.tokens_done += ids.numel() * self.group.world_size
        counts = [int((part != IGNORED).sum()) for part in targets.chunk(self.config.data.accumulation)]
        total = self.group.total(sum(counts))
        if self.dropout:
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
            part_loss = self._compiled_loss(part_ids, part_targets)
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
                parameters["lr"] = lr * parameters["scale"]
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

    def evaluate(self, batches: Batches) -> Validation:
        """The loss of every target in `batches`, each of which every process can make."""
        sums = torch.zeros(2, dtype=torch.float64)
        self.model.eval()
        world = self.group.world_size
        with torch.no_grad():
            for first in range(0, len(batches), world):  # as many on every rank, as sharded weights need it
                index = first + self.group.rank
                ids, targets = batches[index % len(batches)]
                count = int((targets != IGNORED).sum()) if index < len(batches) else 0
                if count == 0:
                    targets = targets.clamp(min=0)
                mean = float(self.loss(ids.to(self.device), targets.to(self.device)))
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

    def checkpoint(self, root: Path, keep: int, extra: dict[str, Any]) -> None:
        """Writes this state below `root` (see `checkpoints`); `extra` goes into its JSON. For all processes to call."""

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
                self.files.companions(directory)
            else:
                self.files.write(directory, self.weights.state())
                checkpoints.save_tensors(directory / checkpoints.OPTIMIZER, optimizer)
            updates = updates_done(self.optimizers, self.steps_done)
            state = {
                "step": self.steps_done,
                "updates": updates,
                "scaler": self.scaler.state_dict(),
                "model": self.model.config.to_document(),
            }
            (directory / checkpoints.STATE).write_text(json.dumps(state | extra, indent=2) + "\n", encoding="utf-8")

        checkpoints.write(root, self.steps_done, keep, content, self.group)

    def load(self, directory: Path, state: dict[str, Any]) -> None:
        """Puts back what `checkpoint` wrote, on any number of processes. `ValueError` where it is damaged."""
        if (directory / checkpoints.SHARDS).is_dir():
            from llmfast.training import sharded

            parameters = self.weights.state() if self.group.sharded else None
            model: Mapping[str, Tensor] = sharded.read_tensors(directory, sharded.MODEL, parameters)
            optimizer = sharded.read_tensors(directory, sharded.OPTIMIZER, parameters)
        else:
            model = self.files.read(directory)
            optimizer = checkpoints.load_tensors(directory / checkpoints.OPTIMIZER)
        try:
            self.weights.load(model)
            load_state(self.optimizers, self.weights, optimizer, state["updates"])
        except KeyError as error:
            raise ValueError(f"the checkpoint {directory} is damaged: it lacks {error}") from None
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.steps_done = state["step"]
