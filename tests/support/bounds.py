"""Accesses out of bounds, which the interpreter lets pass wherever the memory happens to belong to the process."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor

from fusednn.kernels import INTERPRETING


class OutOfBoundsError(Exception):
    """A kernel touched memory that none of its operands owns."""


@contextmanager
def checked_bounds() -> Iterator[None]:
    """In the interpreter, raise `OutOfBoundsError` where a lane that isn't masked loads or stores outside the extents
    of its launch's tensors.  Kernels that read addresses from memory are none of its business.
    """
    if not INTERPRETING:
        yield
        return
    from triton.runtime import interpreter

    execute = interpreter.GridExecutor.__call__
    memory = _CheckedMemory(interpreter._interpreter)

    def checked_execute(executor: Any, *args: Any, **kwargs: Any) -> None:
        memory.extents = [_extent(operand) for operand in (*args, *kwargs.values()) if isinstance(operand, Tensor)]
        execute(executor, *args, **kwargs)

    with (
        mock.patch.object(interpreter, "_interpreter", memory),
        mock.patch.object(interpreter.GridExecutor, "__call__", checked_execute),
    ):
        yield


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses from a tensor's first element to behind its last."""
    start = tensor.data_ptr()
    if not tensor.numel():
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.itemsize


class _CheckedMemory:
    """The interpreter's memory functions, behind a check of addresses."""

    def __init__(self, memory: Any) -> None:
        self._memory = memory
        self.extents: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self._check("loads", pointers, mask, np.dtype(dtype).itemsize)
        return self._memory.load(pointers, mask, other, dtype)

    def store(self, pointers: Any, values: Any, mask: Any) -> Any:
        self._check("stores", pointers, mask, values.dtype.itemsize)
        return self._memory.store(pointers, values, mask)

    def atomic_rmw(self, operation: Any, pointers: Any, values: Any, mask: Any, semantics: Any) -> Any:
        self._check("updates", pointers, mask, values.dtype.itemsize)
        return self._memory.atomic_rmw(operation, pointers, values, mask, semantics)

    def _check(self, what: str, pointers: Any, mask: Any, size: int) -> None:
        addresses = np.asarray(pointers)[np.asarray(mask, dtype=bool)]
        if not addresses.size:
            return
        first, end = int(addresses.min()), int(addresses.max()) + size
        if any(start <= first and end <= stop for start, stop in self.extents):
            return
        inside = np.zeros(addresses.shape, dtype=bool)
        for start, stop in self.extents:
            inside |= (addresses >= np.uint64(start)) & (addresses + np.uint64(size) <= np.uint64(stop))
        if not inside.all():
            raise OutOfBoundsError(f"{what} {int((~inside).sum())} elements outside of every operand")
