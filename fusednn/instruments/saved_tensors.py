"""The census of saved tensors: how much memory a forward pass keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..autograd.recompute import only_watches

__all__ = ["SavedTensors", "saved_tensors"]


@dataclass
class SavedTensors:
    """The tensors that autograd saved, by storage: two views of one memory are kept once."""

    tensors: list[Tensor] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in self.tensors}
        return sum(storages.values())

    def bytes_beside(self, *others: Tensor) -> int:
        """Bytes saved in memory other than that of ``others`` (the parameters, or an input that is kept anyway)."""
        known = {tensor.untyped_storage().data_ptr() for tensor in others}
        rest = [tensor for tensor in self.tensors if tensor.untyped_storage().data_ptr() not in known]
        return SavedTensors(rest).bytes


@contextmanager
def saved_tensors() -> Iterator[SavedTensors]:
    """Record every tensor that autograd saves inside the ``with`` block: under `fusednn.recompute`, that it keeps."""
    census = SavedTensors()

    @only_watches
    def pack(tensor: Tensor) -> Tensor:
        census.tensors.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield census
