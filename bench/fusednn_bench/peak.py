"""The peak of what tensors hold: counted wherever operators run, or by the allocator of their device."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Allocated", "Peak"]


class Peak(TorchDispatchMode):
    """``held``: what storages of results hold, beside those of ``others``; ``bytes``: the most at one time."""

    takes_kernels = True

    def __init__(self, others: Iterable[Tensor]) -> None:
        super().__init__()
        self.bytes = self.held = 0
        self._alive = {tensor.untyped_storage()._cdata for tensor in others}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and result.layout is torch.strided:
                self._hold(result.untyped_storage())
        return results

    def _hold(self, storage: Any) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address not in self._alive:
            self._alive.add(address)
            weakref.finalize(storage, self._release, address, size)
            self.held += size
            self.bytes = max(self.bytes, self.held)

    def _release(self, address: int, size: int) -> None:
        self._alive.remove(address)
        self.held -= size


class Allocated:
    """The same of CUDA's allocator: what it holds, and the most at one time, beside what it held before."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, 0

    def __enter__(self) -> Allocated:
        torch.cuda.synchronize(self._device)
        self._before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def held(self) -> int:
        return torch.cuda.memory_allocated(self._device) - self._before

    @property
    def bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) - self._before
