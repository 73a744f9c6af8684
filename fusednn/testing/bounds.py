"""Accesses out of bounds, which the interpreter lets pass wherever the memory happens to belong to the process.

Addresses have 48 bits: the check writes the number of its operand into the others of a pointer, where arithmetic leaves
it alone.  So a lane that strays from one operand into another is seen as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor

from ..kernels import INTERPRETING
from ..kernels.base.multi_tensor import FlatOperands

__all__ = ["OutOfBoundsError", "checked_bounds"]

_ADDRESS_BITS = 48


class OutOfBoundsError(Exception):
    """A kernel touched memory that isn't the operand's that the pointer was made of."""


@contextmanager
def checked_bounds() -> Iterator[None]:
    """In the interpreter, raise `OutOfBoundsError` where a lane that isn't masked loads or stores outside of the tensor
    that its pointer belongs to.  Kernels that read addresses from a table must stay in one tensor of the table at once.
    """
    if not INTERPRETING:
        yield
        return
    from triton.runtime import interpreter

    convert, addresses = interpreter._implicit_cvt, FlatOperands.addresses
    memory = _CheckedMemory(interpreter._interpreter)

    def convert_numbered(argument: Any) -> Any:
        converted = convert(argument)
        if isinstance(argument, Tensor):
            converted.handle.data |= np.uint64(memory.number(argument) << _ADDRESS_BITS)
        return converted

    def addresses_registered(operands: FlatOperands, tensors: Sequence[Tensor], **options: Any) -> Any:
        words = addresses(operands, tensors, **options)
        memory.listed.update(
            (int(word), int(word) + tensor.numel() * tensor.itemsize)
            for word, tensor in zip(words, tensors, strict=True)
        )
        return words

    with (
        mock.patch.object(interpreter, "_interpreter", memory),
        mock.patch.object(interpreter, "_implicit_cvt", convert_numbered),
        mock.patch.object(FlatOperands, "addresses", addresses_registered),
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
        self._numbers: dict[tuple[int, int], int] = {}
        self._extents: list[tuple[int, int]] = [(0, 0)]  # by number; 0 is the pointer of no operand
        self.listed: set[tuple[int, int]] = set()  # extents of what addresses in memory point to

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def number(self, operand: Tensor) -> int:
        """That of an operand's extent, from 1."""
        extent = _extent(operand)
        if extent not in self._numbers:
            self._numbers[extent] = len(self._extents)
            self._extents.append(extent)
        return self._numbers[extent]

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        return self._memory.load(self._checked("loads", pointers, mask, np.dtype(dtype).itemsize), mask, other, dtype)

    def store(self, pointers: Any, values: Any, mask: Any) -> Any:
        return self._memory.store(self._checked("stores", pointers, mask, values.dtype.itemsize), values, mask)

    def atomic_rmw(self, operation: Any, pointers: Any, values: Any, mask: Any, semantics: Any) -> Any:
        addresses = self._checked("updates", pointers, mask, values.dtype.itemsize)
        return self._memory.atomic_rmw(operation, addresses, values, mask, semantics)

    def atomic_cas(self, pointers: Any, expected: Any, values: Any, semantics: Any) -> Any:
        addresses = self._checked("updates", pointers, True, values.dtype.itemsize)
        return self._memory.atomic_cas(addresses, expected, values, semantics)

    def _checked(self, what: str, pointers: Any, mask: Any, size: int) -> Any:
        """The addresses that numbered pointers stand for."""
        pointers = np.asarray(pointers)
        addresses = pointers & np.uint64(2**_ADDRESS_BITS - 1)
        unmasked = np.broadcast_to(np.asarray(mask, dtype=bool), pointers.shape)
        numbers = (pointers >> np.uint64(_ADDRESS_BITS))[unmasked]
        for number in np.unique(numbers).tolist():
            touched = addresses[unmasked][numbers == number]
            first, end = int(touched.min()), int(touched.max()) + size
            extents = [self._extents[number]] if number else self.listed
            if not any(start <= first and end <= stop for start, stop in extents):
                raise OutOfBoundsError(f"{what} bytes {first} to {end}, outside of {extents}")
        return addresses
