"""The traffic meter: bytes that kernels move and launches that calls make, counted in Triton's interpreter.

Every load and store of the interpreter passes through two functions, which the meter wraps.  An access counts the
distinct elements that it touches: a slope that all lanes of a tile read is read once, but a second pass over memory
counts again, since a GPU would fetch it again.  Where a GPU's caches serve most of that, as in a convolution, whose
windows overlap, ``Launch.distinct_loaded_bytes`` counts it once.  ATen operators that a call makes are counted beside,
for comparison: the tensors each reads, and those it writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..kernels import AVAILABLE

__all__ = ["Launch", "Operation", "OperatorCounter", "Traffic", "measure_traffic", "touched_bytes"]

_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_OVERWRITES = {"copy_", "fill_", "zero_"}  # in-place operators that don't read what they write
_FILLS = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}  # read no more than a shape
# Operators that read operands twice in training: statistics need all of a channel before the first element is done.
_TWICE = {"native_batch_norm": (0,), "native_batch_norm_backward": (0, 1)}
_TRAINING = {"native_batch_norm": 5, "native_batch_norm_backward": 7}  # the argument that says so
_PICKS = {"nll_loss_forward", "nll_loss2d_forward", "nll_loss_backward", "nll_loss2d_backward"}
_NO_KERNELS = {"prim", "profiler"}  # namespaces of operators that ask and annotate


@dataclass
class Launch:
    """One kernel launch: the bytes its programs loaded and stored."""

    kernel: str
    programs: int
    loaded_bytes: int = 0
    stored_bytes: int = 0
    addresses: dict[int, list[Any]] = field(
        default_factory=dict, repr=False
    )  # that were loaded, by the size of the element

    @property
    def distinct_loaded_bytes(self) -> int:
        """Bytes loaded, those that were loaded more than once counted once."""
        return sum(size * len(np.unique(np.concatenate(found))) for size, found in self.addresses.items())


@dataclass(frozen=True)
class Operation:
    """One ATen operator: the bytes of the tensors that it read and wrote."""

    name: str
    read_bytes: int
    written_bytes: int


@dataclass
class Traffic:
    """What happened inside `measure_traffic`."""

    kernel_launches: list[Launch] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)

    def clear(self) -> None:
        """Begin again."""
        self.kernel_launches.clear()
        self.operations.clear()

    @property
    def launches(self) -> int:
        return len(self.kernel_launches)

    @property
    def loaded_bytes(self) -> int:
        return sum(launch.loaded_bytes for launch in self.kernel_launches)

    @property
    def stored_bytes(self) -> int:
        return sum(launch.stored_bytes for launch in self.kernel_launches)

    @property
    def bytes(self) -> int:
        return self.loaded_bytes + self.stored_bytes

    @property
    def aten_operations(self) -> int:
        return len(self.operations)

    @property
    def aten_bytes(self) -> int:
        return sum(operation.read_bytes + operation.written_bytes for operation in self.operations)


@contextmanager
def measure_traffic() -> Iterator[Traffic]:
    """Count kernel launches, their bytes, and ATen operators, until the ``with`` block ends.

    Kernels are only seen in the interpreter (``TRITON_INTERPRET=1``), ATen operators anywhere.
    """
    traffic = Traffic()
    operators = OperatorCounter(traffic)
    if not AVAILABLE:
        with operators:
            yield traffic
        return
    from triton.runtime import interpreter

    execute = interpreter.GridExecutor.__call__

    def counted_execute(executor: Any, *args: Any, **kwargs: Any) -> None:
        grid = executor.grid if isinstance(executor.grid, tuple) else (executor.grid,)
        traffic.kernel_launches.append(Launch(executor.fn.__name__, int(np.prod(grid))))
        with operators.paused():
            execute(executor, *args, **kwargs)

    with (
        mock.patch.object(interpreter, "_interpreter", _CountingMemory(interpreter._interpreter, traffic)),
        mock.patch.object(interpreter.GridExecutor, "__call__", counted_execute),
        operators,
    ):
        yield traffic


class _CountingMemory:
    """The interpreter's memory functions, counting what they touch."""

    def __init__(self, memory: Any, traffic: Traffic) -> None:
        self._memory = memory
        self._traffic = traffic

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        launch, size = self._traffic.kernel_launches[-1], np.dtype(dtype).itemsize
        addresses = _distinct(pointers, mask)
        launch.loaded_bytes += len(addresses) * size
        launch.addresses.setdefault(size, []).append(addresses)
        return self._memory.load(pointers, mask, other, dtype)

    def store(self, pointers: Any, values: Any, mask: Any) -> Any:
        self._traffic.kernel_launches[-1].stored_bytes += len(_distinct(pointers, mask)) * values.dtype.itemsize
        return self._memory.store(pointers, values, mask)

    def atomic_rmw(self, operation: Any, pointers: Any, values: Any, mask: Any, semantics: Any) -> Any:
        touched = len(_distinct(pointers, mask)) * values.dtype.itemsize
        self._traffic.kernel_launches[-1].loaded_bytes += touched
        self._traffic.kernel_launches[-1].stored_bytes += touched
        return self._memory.atomic_rmw(operation, pointers, values, mask, semantics)


def _distinct(pointers: Any, mask: Any) -> Any:
    """The different addresses that the active lanes of an access touch."""
    return np.unique(np.asarray(pointers)[np.asarray(mask, dtype=bool)])


class OperatorCounter(TorchDispatchMode):
    """Adds the ATen operators that it sees to what was counted."""

    takes_kernels = True  # for fusednn.autograd.dispatch

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._traffic = traffic
        self._paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The interpreter moves its arguments about with PyTorch; a GPU doesn't."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fusednn":
            # Our operators are Python: step into them, so that the ATen operators they call are counted too.
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        changed = _changed(func, args) if result is None else result
        written = [leaf for leaf in tree_leaves(changed) if isinstance(leaf, Tensor)]
        empty = bool(written) and not any(tensor.numel() for tensor in written)  # nothing to do: no kernel
        view = func.is_view or torch.Tag.inplace_view in func.tags
        idle = view or name in _ALLOCATIONS or func.namespace in _NO_KERNELS or empty
        if not (self._paused or idle):
            self._traffic.operations.append(_count(name, args, kwargs, written))
        return result


def _changed(func: Any, args: Any) -> list[Any]:
    """What an operator that returns nothing wrote: the arguments that its schema says it changes."""
    declared = zip(func._schema.arguments, args, strict=False)
    return [value for argument, value in declared if argument.alias_info and argument.alias_info.is_write]


def _count(name: str, args: Any, kwargs: Any, written: list[Tensor]) -> Operation:
    leaves = {id(leaf): leaf for leaf in tree_leaves((args, kwargs))}  # an operand given twice is read once
    inputs = [leaf for leaf in leaves.values() if isinstance(leaf, Tensor)]
    if name in _OVERWRITES | _FILLS:
        inputs = inputs[1:]
    extra = 0
    if name in _PICKS:  # of the input an element for each target, backward its shape alone
        x, target = args[1:3] if name.endswith("backward") else args[:2]
        inputs = [operand for operand in inputs if operand is not x]
        extra = 0 if name.endswith("backward") else target.numel() * x.itemsize
    if name in _TWICE and args[_TRAINING[name]]:
        extra = sum(touched_bytes(args[place]) for place in _TWICE[name])
    return Operation(name, extra + sum(map(touched_bytes, inputs)), sum(map(touched_bytes, written)))


def touched_bytes(tensor: Tensor) -> int:
    """Bytes of the tensor's distinct elements: an expanded dimension repeats the same ones."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0]
    return int(np.prod(sizes, dtype=np.int64)) * tensor.itemsize
