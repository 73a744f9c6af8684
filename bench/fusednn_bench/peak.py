"""The peak of what tensors hold, counted wherever operators run: an allocator's would need its device."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Peak"]


class Peak(TorchDispatchMode):
    """``bytes``: the most that storages of results held at one time, beside those of ``others``."""

    takes_kernels = True

    def __init__(self, others: Iterable[Tensor]) -> None:
        super().__init__()
        self.bytes = self._held = 0
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
            self._held += size
            self.bytes = max(self.bytes, self._held)

    def _release(self, address: int, size: int) -> None:
        self._alive.remove(address)
        self._held -= size
