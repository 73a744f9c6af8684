"""Parameters that are spread over processes (DTensors): the memory that this process has of them, and sums over all."""

import sys
from typing import Any

from torch import Tensor
from torch.nn import Parameter

__all__ = ["PLAIN_TYPES", "has_whole_rows", "is_distributed", "layout", "local", "sum_over_mesh"]

#: Types of tensors whose memory is theirs alone, and what it seems.
PLAIN_TYPES = {Tensor, Parameter}


def is_distributed(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor.  Nothing is one before its module has been imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return type(tensor) not in PLAIN_TYPES and module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Tensor:
    """The memory that this process has of a tensor: without gradients to record, ``to_local`` makes no copy."""
    memory: Tensor = tensor.to_local() if is_distributed(tensor) else tensor
    return memory


def layout(tensor: Any) -> Any:
    """How a tensor is spread, comparable with others'; None where it isn't."""
    return (tensor.device_mesh, tensor.placements) if is_distributed(tensor) else None


def has_whole_rows(tensor: Any) -> bool:
    """Whether a row, all elements with one index of the first dimension, is in one process."""
    placements = tensor.placements if is_distributed(tensor) else ()
    return all(placement.is_shard(0) or placement.is_replicate() for placement in placements)


def sum_over_mesh(sums: Tensor, like: Any) -> Tensor:
    """Partial sums of one process's shards, added up over those of all processes."""
    module = sys.modules["torch.distributed.tensor"]
    placements = [module.Replicate() if placement.is_replicate() else module.Partial() for placement in like.placements]
    total = module.DTensor.from_local(sums.sum().reshape(1), like.device_mesh, placements, run_check=False)
    everywhere: Tensor = total.full_tensor()
    return everywhere
