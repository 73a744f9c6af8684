"""What a call launches, without launching it: no memory is touched, so tensors may have any size.

Kernels take CPU tensors here, whose memory is reserved and never written: operating systems give none before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.backends.compiler import GPUTarget

__all__ = ["Launched", "launches_of", "take_cpu_tensors"]

#: Operators on fewer elements are computed: seeds, counters, tables of addresses.
_COMPUTED = 1 << 16


def take_cpu_tensors() -> None:
    """Have kernels take CPU tensors in this process, in which nothing can be launched.  Before fusednn is imported."""
    if "fusednn" in sys.modules:
        raise RuntimeError("fusednn is imported already: where its kernels run is settled")
    triton.runtime.driver.set_active(_Nowhere())


class _Nowhere:
    """As much of a driver as is asked for where nothing is launched."""

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Launched(NamedTuple):
    """A launch that wasn't made."""

    configuration: Any
    programs: int
    arguments: tuple[Any, ...]

    @property
    def operands(self) -> list[Tensor]:
        """The tensors, each once."""
        found = {each.data_ptr(): each for each in self.arguments if isinstance(each, Tensor)}
        return list(found.values())

    @property
    def bytes(self) -> int:
        """Of the operands, each read or written once."""
        return sum(operand.numel() * operand.element_size() for operand in self.operands)

    @property
    def elements(self) -> int:
        """Of the largest operand."""
        return max(operand.numel() for operand in self.operands)


def launches_of(call: Callable[[], object]) -> list[Launched]:
    """What ``call`` launches."""
    launched: list[Launched] = []
    with _recorded(launched), _Unwritten():
        call()
    return launched


@contextmanager
def _recorded(launched: list[Launched]) -> Iterator[None]:
    from fusednn.kernels.base import launch

    before = launch.recorder
    launch.recorder = lambda *launch: launched.append(Launched(*launch))
    try:
        yield
    finally:
        launch.recorder = before


class _Unwritten(TorchDispatchMode):
    """Results have their shapes, strides and types, but what is large isn't computed."""

    takes_kernels = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from fusednn.autograd.operators import IMPLEMENTATIONS

        given = kwargs or {}
        if func in IMPLEMENTATIONS:
            with self:
                return IMPLEMENTATIONS[func](*args, **given)
        tensors = [each for each in tree_leaves((args, given)) if isinstance(each, Tensor)]
        if func.is_view or (tensors and max(each.numel() for each in tensors) <= _COMPUTED):
            return func(*args, **given)
        if func._schema.is_mutable:  # it returns what it would have written to
            return args[0] if func._schema.returns else None
        shapes, given = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, given))
        results = func(*shapes, **(given | ({"device": "meta"} if "device" in given else {})))
        return tree_map_only(Tensor, _unwritten, results)


def _unwritten(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
