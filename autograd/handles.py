"""What stands for a saved tensor under `fusednn.autograd.recompute`: the tensor itself, or how it is made again."""

import functools
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = ["Handle", "Kept", "Recipe", "Result", "View", "mark", "marked", "note", "noted", "stream_of"]


class Kept:
    """A tensor that is kept.  Like PyTorch's saved tensors it notices changes in place."""

    __slots__ = ("__weakref__", "tensor", "version")
    depth = -1

    def __init__(self, tensor: Tensor) -> None:
        # Not the tensor itself where it has a graph, which holds this.
        self.tensor = tensor if tensor.grad_fn is None else tensor.detach()
        self.version = tensor._version

    @property
    def changed(self) -> bool:
        return self.tensor._version != self.version

    def get(self) -> Tensor:
        tensor = self.tensor
        if tensor._version != self.version:
            _complain(tensor, self.version)
        return tensor


class Result:
    """What is known of a tensor that was computed, without its memory: how it lies there, and its version."""

    __slots__ = ("counter", "dtype", "size", "strides", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.counter, self.version = _version_counter(tensor), tensor._version
        self.size, self.strides, self.dtype = tensor.size(), tensor.stride(), tensor.dtype

    @property
    def device(self) -> torch.device:
        return self.counter.device

    @property
    def changed(self) -> bool:
        return self.counter._version != self.version


class Recipe:
    """How a result is made again of its operands.

    Those who saved the result share what is made until each has asked for it once; another stream makes its own.
    """

    __slots__ = (
        *("__weakref__", "_again", "_made", "_operands", "_result", "_waiting"),
        *("depth", "shares", "stream"),
    )

    def __init__(self, result: Result, again: Callable[..., Tensor], operands: Sequence[Any], depth: int) -> None:
        self._result, self._again, self._operands, self.depth = result, again, operands, depth
        self.stream = stream_of(result.device)
        self.shares = self._waiting = 0
        self._made: tuple[int, Tensor] | None = None
        if depth > 0:
            for operand in operands:
                if isinstance(operand, Recipe):
                    operand.shares += 1

    version = property(attrgetter("_result.version"))
    changed = property(attrgetter("_result.changed"))

    def get(self) -> Tensor:
        if self._result.changed:
            _complain(self._result.counter, self._result.version)
        stream, made = stream_of(self._result.device), self._made
        if made is None or made[0] != stream:
            made = stream, self._make(stream)
            self._made, self._waiting = made, self.shares
        # Threads may race here: then the result is made twice, or held a little longer.
        self._waiting -= 1
        if self._waiting <= 0:
            self._made = None
        return made[1]

    def _make(self, stream: int) -> Tensor:
        operands = [operand if operand is None else operand.get() for operand in self._operands]
        with torch.no_grad(), _without_autocast(self._result.device.type):
            y = self._again(*operands)
        if stream != self.stream:  # the allocator must know that the operands are used there
            for operand in operands:
                if operand is not None:
                    operand.record_stream(torch.cuda.current_stream(y.device))
        strides = self._result.strides
        assert y.stride() == strides, f"made again with strides {y.stride()}, not {strides}"
        return y


class View:
    """A part of a handle's tensor, or another view of it."""

    __slots__ = ("_geometry", "handle")

    def __init__(self, handle: Kept | Recipe, tensor: Tensor) -> None:
        self.handle, self._geometry = handle, (tensor.shape, tensor.stride(), tensor.storage_offset())

    depth = property(attrgetter("handle.depth"))
    changed = property(attrgetter("handle.changed"))

    def get(self) -> Tensor:
        return self.handle.get().as_strided(*self._geometry)


Handle: TypeAlias = Kept | Recipe | View


def _complain(tensor: Tensor, version: int) -> None:
    """PyTorch's error, of a tensor that has been changed since it had this version."""
    raise RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"it is at version {tensor._version}; expected version {version} instead. Hint: enable anomaly detection "
        "to find the operation that failed to compute its gradient, with torch.autograd.set_detect_anomaly(True)."
    )


def _version_counter(tensor: Tensor) -> Tensor:
    """A tensor without memory that shares the version counter."""
    counter = tensor.detach()
    counter.data = _nothing(tensor.device, tensor.dtype)
    return counter


@functools.cache
def _nothing(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, device=device, dtype=dtype)


def stream_of(device: torch.device) -> int:
    """A number of the current stream."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    """What autocast cast was cast before it was saved."""
    return torch.autocast(device, enabled=False) if torch._C._is_any_autocast_enabled() else nullcontext()


# --- Where they are found ---------------------------------------------------------------------------------------------

_NOTE = "fusednn.saved"  # in a node's metadata, with the number of its output: a weak reference to the handle
_MARK = "fusednn.result"  # likewise: the result


def noted(node: Any, output: int) -> Kept | Recipe | None:
    """The handle of a node's output that somebody has saved, or can be made again for; None where there is none."""
    note = node.metadata.get((_NOTE, output))
    handle: Kept | Recipe | None = None if note is None else note()
    return handle


def note(node: Any, output: int, handle: Kept | Recipe) -> None:
    """Let `noted` find the handle of a node's output, as long as somebody holds it."""
    node.metadata[_NOTE, output] = weakref.ref(handle)


def mark(tensor: Tensor) -> None:
    """Let `marked` know a tensor that was computed, whose recipe may be asked for when it is out of reach itself."""
    node: Any = tensor.grad_fn
    node.metadata[_MARK, tensor.output_nr] = Result(tensor)


def marked(node: Any, output: int) -> Result | None:
    """A node's output that was marked, where it is unchanged since then."""
    result: Result | None = node.metadata.get((_MARK, output))
    return None if result is None or result.changed else result
