"""Weights, gradients and the optimizer's state divided among processes: FSDP2 (Zhao et al., 2023; ZeRO-3).

Every process keeps its rows of each weight in float32. A block's weights are gathered, in fewer bits, just before the
block computes, and its gradients are summed and divided again (in float32) when its backward is through.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from llmfast.models import LanguageModel, config_from_document
from llmfast.training.checkpoints import SHARDS, read_state, verify
from llmfast.training.processes import Processes
from llmfast.training.weights import kinds_of
from llmfast.weights.saving import save

MODEL, OPTIMIZER = "model.", "optimizer."  # what the names in a sharded checkpoint begin with


class ShardedWeights:
    """`MasterWeights` for FSDP2: `model` is sharded in place, over all processes of `group`."""

    def __init__(self, model: LanguageModel, dtype: torch.dtype, group: Processes):
        mesh = init_device_mesh(group.device.type, (group.world_size,))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for block in model.block_modules:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(model, "loss")
        self.model = model
        self.gradient_scale = float(group.world_size)  # FSDP averages over processes where their shares are to add up
        self.parameters = dict(model.named_parameters())
        self._kinds = kinds_of(model.config)
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in self.parameters.items()}

    def flat(self, *kinds: str) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.parameters.items() if self._kinds[name] in kinds]

    def matrices(self, kind: str) -> list[nn.Parameter]:
        raise ValueError("muon works on whole matrices, which fsdp divides: use --parallel ddp, or optimizer = adamw")

    def named_parts(self, parameter: Tensor, tensor: Tensor) -> list[tuple[str, Tensor]]:
        return [(self._names[parameter], tensor)]

    def zero_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def collect(self) -> None:
        pass

    def reduce(self, group: Processes) -> None:
        pass  # backward did

    def clip(self, largest: float) -> Tensor:
        limit = largest if largest > 0 else float("inf")
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def publish(self) -> None:
        pass

    def state(self) -> dict[str, Tensor]:
        """The weights by name, divided."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.placed(state[name], parameter))

    def placed(self, tensor: Tensor, like: Tensor) -> Tensor:
        """A whole tensor as `like` is divided; one that is divided already stays."""
        if isinstance(tensor, DTensor) or not isinstance(like, DTensor):
            return tensor
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def whole(tensor: Tensor) -> Tensor:
    """All of a divided tensor, on the CPU."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def write_shards(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Every process writes what it has of divided tensors, as safetensors. For all processes to call."""
    writer = HuggingFaceStorageWriter(str(directory / SHARDS), save_distributed=True)
    dcp.save(dict(tensors), storage_writer=writer)


def read_shards(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills `tensors`, whole or divided among any number of processes, with what shards hold under their names.

    `ValueError` where something is missing or damaged.
    """
    reader = HuggingFaceStorageReader(str(directory / SHARDS))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that one process alone reads: just what is wanted
            dcp.load(dict(tensors), storage_reader=reader, no_dist=not dist.is_initialized())
    except Exception as error:  # a checkpoint's reader has many ways to fail
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"the checkpoint {directory} is damaged: {reason}") from None


def names_in(directory: Path) -> dict[str, torch.Size]:
    """The name and the shape of every tensor in the shards of a checkpoint."""
    metadata = HuggingFaceStorageReader(str(directory / SHARDS)).read_metadata().state_dict_metadata
    return {name: each.size for name, each in metadata.items() if hasattr(each, "size")}


def read_tensors(directory: Path, prefix: str, parameters: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of one kind in a checkpoint's shards, by their names without the prefix.

    Whole, or divided as the weights in `parameters` are to which they belong: then no process ever has all of them.
    """
    found: dict[str, Tensor] = {}
    for name, size in names_in(directory).items():
        if name.startswith(prefix):
            bare = name.removeprefix(prefix)
            owner = bare if prefix == MODEL else bare.rpartition(".")[0]
            found[name] = torch.empty(size) if parameters is None else torch.empty_like(parameters[owner].detach())
    read_shards(directory, found)
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def consolidate(directory: str | Path, out: str | Path) -> None:
    """Makes the weights of a sharded checkpoint one model, which `load` takes, in the directory `out`."""
    directory = Path(directory)
    if not (directory / SHARDS).is_dir():
        raise ValueError(f"{directory} is no sharded checkpoint: it has no directory {SHARDS}")
    verify(directory, Processes())
    config = config_from_document(read_state(directory)["model"])
    save(out, config, read_tensors(directory, MODEL), tokenizer_from=directory)
