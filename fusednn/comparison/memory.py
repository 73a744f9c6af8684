"""What a copy keeps for its backward pass, layer by layer; bytes and launches of a step where they can be counted."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .. import kernels
from ..benchmark.counting import operators_of_cuda
from ..instruments.census import saved_by_layer
from ..instruments.launches import count_launches
from ..instruments.traffic import measure_traffic
from .contestants import Contestant

__all__ = ["Memory", "Traffic", "kept_by_layer", "traffic"]


@dataclass(frozen=True)
class Memory:
    """Bytes kept between forward and backward beside parameters and batch, by the layer that keeps them first; and, on
    a GPU, the peak of a step above what was allocated before it.
    """

    by_layer: dict[str, int]
    peak: int | None

    @property
    def kept(self) -> int:
        return sum(self.by_layer.values())


@dataclass(frozen=True)
class Traffic:
    """Bytes and launches of a training step, of kernels and of PyTorch's operators."""

    bytes: int
    launches: int


def kept_by_layer(contestant: Contestant, device: torch.device) -> Memory:
    """Of a step that isn't the first: what kernels keep, also where none run, after which the copy is of no use."""
    counts = kernels.AVAILABLE and not kernels.ON_CPU and device.type == "cpu"
    with count_launches() if counts else nullcontext():
        return _kept_by_layer(contestant, device)


def _kept_by_layer(contestant: Contestant, device: torch.device) -> Memory:
    batch = contestant.task.batch(1)
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    with saved_by_layer(contestant.model, tensors) as rows:
        contestant.forward(batch, 1)
    by_layer: dict[str, int] = {}
    for row in rows:
        name = (row.name or "(the model)") if row.layer else "(loss)"
        by_layer[name] = by_layer.get(name, 0) + row.bytes
    return Memory(by_layer, _peak(contestant, device))


def _peak(contestant: Contestant, device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    contestant.optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    contestant.step(2)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def traffic(contestant: Contestant) -> Traffic | None:
    """Counted in Triton's interpreter, or from launches' operands; None where Triton isn't installed.

    Off a GPU the copy is of no use afterwards: without the interpreter kernels aren't run, and leave parameters as
    memory comes.  Where the model can't go on with such numbers, there is no count, either.
    """
    if not kernels.AVAILABLE:
        return None
    meter = measure_traffic if kernels.INTERPRETING else count_launches
    try:
        with operators_of_cuda(), meter() as counted:
            contestant.step(3)
            counted.clear()
            contestant.step(4)
    except Exception:
        if kernels.INTERPRETING:
            raise
        return None
    return Traffic(counted.bytes + counted.aten_bytes, counted.launches + counted.aten_operations)
