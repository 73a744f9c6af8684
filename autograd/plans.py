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
from struct import Struct
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._C._dynamo import guards as _guards
from torch._C._dynamo.guards import TensorGuards
from torch.utils._python_dispatch import TorchDispatchMode

from ..kernels.base import launch as launching
from ..kernels.base.launch import Configuration

__all__ = ["ALLOCATORS", "Calls", "Plans", "guards"]

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

_Guards: TypeAlias = Callable[[tuple[Any, ...]], bool]


class Calls:
    """What was worked out for calls, to be found again for others that are alike.

    So are calls whose arguments are of the same types and of equal values (0.0 isn't -0.0), and whose operands pass the
    guards, and are the same ones in the same places.
    """

    def __init__(self) -> None:
        self._forms: dict[tuple[type, ...], _Form] = {}

    def find(self, arguments: tuple[Any, ...]) -> Any:
        """What is kept for calls like this one, or None."""
        form = self._forms.get(tuple(map(type, arguments)))
        if form is not None:
            for is_alike, found in form.kept.get(form.key(arguments), ()):
                if is_alike(arguments):
                    return found
        return None

    def count(self, arguments: tuple[Any, ...]) -> int:
        """How many such calls there were, with this one, since something was last kept for one."""
        form = self._form(arguments)
        form.counts[key := form.key(arguments)] += 1
        return form.counts[key]

    def keep(self, arguments: tuple[Any, ...], is_alike: _Guards, found: Any) -> None:
        """Keep something for calls whose operands ``is_alike`` holds of, as of `guards`."""
        if sum(len(form.counts) for form in self._forms.values()) > _MOST:
            self.forget()
        form = self._form(arguments)
        form.kept.setdefault(key := form.key(arguments), []).append((is_alike, found))
        form.counts[key] = 0

    def forget(self) -> None:
        self._forms.clear()

    def _form(self, arguments: tuple[Any, ...]) -> _Form:
        kinds = tuple(map(type, arguments))
        return self._forms.get(kinds) or self._forms.setdefault(kinds, _Form(arguments))


class _Form:
    """Arguments of certain types in their places: what of them is compared by value, and what is kept, by these values.

    The comparison is written for each form, as a launch is: a loop would take several times as long.
    """

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.counts: Counter[Any] = Counter()
        self.kept: dict[Any, list[tuple[_Guards, Any]]] = {}
        shapes, floats, others = [], [], []
        for place, each in enumerate(arguments):
            if isinstance(each, Tensor):
                shapes.append(f"a[{place}].shape")
            elif type(each) is float:
                floats.append(f"a[{place}]")
            else:
                others.append(f"tuple(a[{place}])" if type(each) is list else f"a[{place}]")
        parts = [*shapes[:1], *others, f"bits({', '.join(floats)})"]
        self.key: Callable[[tuple[Any, ...]], Any] = eval(
            f"lambda a: ({', '.join(parts)},)", {"bits": Struct(f"{len(floats)}d").pack}
        )


def guards(arguments: tuple[Any, ...]) -> _Guards:
    """Whether the operands among the arguments of a call are like these, and gradients are enabled or not, as now."""
    places: dict[int, int] = {}
    same = [
        f"a[{place}] is a[{places[id(each)]}] and "
        for place, each in enumerate(arguments)
        if isinstance(each, Tensor) and places.setdefault(id(each), place) != place
    ]
    # Each of them once: the guards hold of different ones alone.
    operands = [arguments[place] for place in places.values()]
    check = TensorGuards(*operands, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    # PyTorch's guards ask operands alone, which require gradients wherever they are.
    enabled = "enabled()" if torch.is_grad_enabled() else "not enabled()"
    found: _Guards = eval(
        f"lambda a: {enabled} and {''.join(same)}check({', '.join(f'a[{place}]' for place in places.values())})",
        {"check": check, "enabled": torch.is_grad_enabled},
    )
    return found


class Plans:
    """The plans of one operator's function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._calls = Calls()

    def find(self, arguments: tuple[Any, ...]) -> Callable[..., Any] | None:
        """The function to call for arguments like these, where there have been enough of them."""
        found: Callable[..., Any] | None = self._calls.find(arguments)
        return found

    def call(self, *arguments: Any) -> Any:
        """Compute, and remember how."""
        if self._calls.count(arguments) < _RECORDED_CALL or not _lock.acquire(blocking=False):
            return self._function(*arguments)
        try:
            is_alike = guards(arguments)
            result, plan = _record(self._function, arguments)
        finally:
            _lock.release()
        self._calls.keep(arguments, is_alike, plan)
        return result

    def forget(self) -> None:
        self._calls.forget()


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
        return result, _Writer(function, arguments).write(recorder.events, result)
    except LookupError:  # memory from elsewhere
        return result, function


#: What compiled code allocates by, of the type of device, in half the time of `torch.empty_strided`.  A GPU's memory is
#: the current one's.
ALLOCATORS: dict[str, Any] = {device: getattr(_guards, f"_empty_strided_{device}") for device in ("cpu", "cuda")}


class _Writer:
    """Writes a recording of ``function`` down as one."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._parameters = [f"a{number}" for number in range(len(arguments))]
        self._scope: dict[str, Any] = {}
        self._lines: list[str] = []
        self._function = function
        self._gpus: set[int] = set()
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
        for gpu in self._gpus:
            original = f"{self._constant(self._function)}({', '.join(self._parameters)})"
            self._lines.insert(0, f"if {self._constant(torch._C._cuda_getDevice)}() != {gpu}: return {original}")
        source = "\n    ".join([f"def plan({', '.join(self._parameters)}):", *self._lines])
        exec(source, self._scope)
        plan: Callable[..., Any] = self._scope["plan"]
        return plan

    def _allocate(self, tensor: Tensor) -> None:
        device, given = tensor.device, f"{tuple(tensor.shape)}, {tensor.stride()}, {self._constant(tensor.dtype)}"
        if device.type == "cuda":
            self._gpus.add(device.index)
        self._assign(tensor, f"{self._constant(ALLOCATORS[device.type])}({given})")

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
