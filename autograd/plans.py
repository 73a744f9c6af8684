"""Plans: what an operator does with operands like these, worked out once and repeated.

An operator looks at shapes, strides and dtypes, chooses configurations, allocates and launches.  For operands that
differ in nothing but their addresses and elements it does the same again; so after a few such calls one is recorded,
and becomes straight-line code: its allocations, launches and operators of PyTorch's in their order, with every number
worked out.  That operands are alike is checked by the guards of PyTorch's compiler, in C++: types, dispatch keys (those
of modes, transforms and autocast too), dtypes, devices, shapes and strides.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards
from torch.utils._python_dispatch import TorchDispatchMode

from ..kernels.base import launch as launching
from ..kernels.base.launch import Configuration

__all__ = ["Plans"]

_aten = torch.ops.aten
_ALLOCATIONS = frozenset(
    {
        _aten.empty.memory_format,
        _aten.empty_like.default,
        _aten.empty_strided.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
    }
)
#: The call that is recorded; shapes that never come back aren't.
_RECORDED_CALL = 3
#: The most different calls that are remembered of one operator.
_MOST = 1024
_lock = threading.Lock()


class Plans:
    """The plans of one operator's function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._calls: Counter[Any] = Counter()
        self._plans: dict[Any, list[tuple[TensorGuards, Callable[..., Any]]]] = {}

    def find(self, arguments: tuple[Any, ...]) -> Callable[..., Any] | None:
        """The function to call for arguments like these, where there have been enough of them."""
        key, operands = _parts(arguments)
        for guards, plan in self._plans.get(key, ()):
            if guards.check(*operands):
                return plan
        return None

    def call(self, *arguments: Any) -> Any:
        """Compute, and remember how."""
        key, operands = _parts(arguments)
        self._calls[key] += 1
        if self._calls[key] < _RECORDED_CALL or not _lock.acquire(blocking=False):
            return self._function(*arguments)
        try:
            guards = TensorGuards(*operands, dynamic_dims_sizes=None, dynamic_dims_strides=None)
            result, plan = _record(self._function, arguments)
        finally:
            _lock.release()
        if len(self._calls) > _MOST:
            self.forget()
        self._plans.setdefault(key, []).append((guards, plan))
        self._calls[key] = 0
        return result

    def forget(self) -> None:
        self._calls.clear()
        self._plans.clear()


def _parts(arguments: tuple[Any, ...]) -> tuple[Any, list[Tensor]]:
    """What is compared by value (0.0 isn't -0.0), and the operands, whose guards are asked."""
    operands: list[Tensor] = []
    values: list[Any] = []
    for each in arguments:
        if isinstance(each, Tensor):
            operands.append(each)
            values.append(Tensor)  # where it stands: another one may be missing
        else:
            values.append(tuple(each) if type(each) is list else each or repr(each))
    if len(set(map(id, operands))) < len(operands):  # guards see each once, and the key who is the same
        places: dict[int, int] = {}
        values.append(tuple(places.setdefault(id(each), len(places)) for each in operands))
        operands = list({id(each): each for each in operands}.values())
    return (operands[0].shape, *values), operands


class _Recorder(TorchDispatchMode):
    """Notes what is allocated, computed by PyTorch, and launched, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[Any, ...]] = []
        self.repeatable = True
        self._thread = threading.get_ident()
        self._launching = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._launching or func is _aten.detach.default:
            pass
        elif func in _ALLOCATIONS:
            self.events.append(("allocate", result))
        elif func.namespace == "aten" and _is_pure(func) and all(isinstance(each, Tensor) for each in _all(result)):
            self.events.append(("compute", func, args, kwargs or {}, result))
        else:
            self.repeatable = False
        return result

    def launch(self, configuration: Configuration, programs: int, arguments: tuple[Any, ...]) -> None:
        """In place of the configuration's own launch.  The interpreter computes with PyTorch: that isn't noted."""
        if threading.get_ident() == self._thread:
            self.events.append(("launch", configuration, programs, arguments))
        self._launching = True
        try:
            configuration.launcher(programs, *arguments)
        finally:
            self._launching = False


def _all(result: Any) -> Sequence[Any]:
    return result if isinstance(result, list | tuple) else (result,)


def _is_pure(func: Any) -> bool:
    return not {torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output} & set(func.tags)


def _record(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, Callable[..., Any]]:
    """The result of a call, and a function that does the same: the original, where it did something unforeseen."""
    recorder = _Recorder()
    launching.recorder = recorder.launch
    try:
        with recorder:
            result = function(*arguments)
    finally:
        launching.recorder = None
    if not recorder.repeatable:
        return result, function
    try:
        return result, _Writer(arguments).write(recorder.events, result)
    except LookupError:  # memory from elsewhere
        return result, function


class _Writer:
    """Writes a recording down as a function."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self._parameters = [f"a{number}" for number in range(len(arguments))]
        self._scope: dict[str, Any] = {"empty": torch.empty_strided}
        self._lines: list[str] = []
        self._names: dict[Any, str] = {}
        operands = {
            id(each): (n, each) for n, each in zip(self._parameters, arguments, strict=True) if isinstance(each, Tensor)
        }
        for name, operand in operands.values():
            # Two operands in the same memory needn't be elsewhere: which one is meant can't be told.
            place = _place(operand)
            self._names[place] = "" if place in self._names else name

    def write(self, events: list[tuple[Any, ...]], result: Any) -> Callable[..., Any]:
        for kind, *event in events:
            if kind == "allocate":
                self._allocate(*event)
            elif kind == "compute":
                func, args, kwargs, made = event
                given = [*map(self._name, args), *(f"{name}={self._name(value)}" for name, value in kwargs.items())]
                self._assign(made, f"{self._constant(func)}({', '.join(given)})")
            else:
                configuration, programs, args = event
                given = [str(programs), *map(self._name, args)]
                self._lines.append(f"{self._constant(configuration.launcher)}({', '.join(given)})")
        self._lines.append(f"return {self._name(result)}")
        source = "\n    ".join([f"def plan({', '.join(self._parameters)}):", *self._lines])
        exec(source, self._scope)
        plan: Callable[..., Any] = self._scope["plan"]
        return plan

    def _allocate(self, tensor: Tensor) -> None:
        shape, dtype, device = tuple(tensor.shape), self._constant(tensor.dtype), self._constant(tensor.device)
        self._assign(tensor, f"empty({shape}, {tensor.stride()}, dtype={dtype}, device={device})")

    def _assign(self, made: Any, expression: str) -> None:
        name = f"t{len(self._lines)}"
        self._lines.append(f"{name} = {expression}")
        for number, tensor in enumerate(_all(made)):
            self._names[_place(tensor)] = name if tensor is made else f"{name}[{number}]"

    def _constant(self, value: Any) -> str:
        name = f"c{len(self._scope)}"
        self._scope[name] = value
        return name

    def _name(self, value: Any) -> str:
        if isinstance(value, Tensor):
            if not (name := self._names[_place(value)]):
                raise LookupError
            return name
        if isinstance(value, tuple | list):
            return f"({''.join(f'{self._name(each)}, ' for each in value)})"
        return repr(value) if value is None or isinstance(value, int | str) else self._constant(value)


def _place(tensor: Tensor) -> Any:
    """What tells tensors apart that exist at the same time; those without elements are all alike."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
