"""PyTorch's functions in code that no graph stands for: a copy of the code reads other names, by which they are ours.

``F`` is a namespace there in which ``softmax`` is ours, and a helper of the same package is a copy of its own.  Nothing
is patched: other code that calls these functions, or these helpers, calls what it did.  Each name is looked up when the
copy reads it, so that it calls what a program has put in a function's place.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import autograd
from ...autograd import stock as F
from ..twin import TWINS

__all__ = ["OURS", "Rebinding", "rebinding"]


def _of_torch(stock: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """Ours with the signature of ``torch``'s, which takes what ``torch.nn.functional``'s doesn't."""

    @functools.wraps(ours)
    def call(*args: Any, **kwargs: Any) -> Any:
        if len(args) <= 2 and isinstance(args[0] if args else None, Tensor) and not kwargs.keys() - {"dim", "dtype"}:
            return ours(*args, **kwargs)
        return stock(*args, **kwargs)

    return call


#: By PyTorch's function, ours.
OURS: dict[Any, Callable[..., Any]] = {
    **{getattr(F, name): getattr(autograd, name) for name in autograd.__all__ if hasattr(F, name)},
    **{
        getattr(torch, name): _of_torch(getattr(torch, name), getattr(autograd, name))
        for name in ("log_softmax", "relu", "selu", "sigmoid", "softmax", "tanh")
    },
}
#: PyTorch's function behind each of ours, which `fusednn.replace_functions` puts in its place.
_STOCK = {ours: stock for stock, ours in OURS.items()}


class Rebinding(NamedTuple):
    """A class's methods that call functions of ours, by name."""

    methods: dict[str, Callable[[], FunctionType]]  # each what the class has by this name, copied
    functions: tuple[str, ...]  # those of PyTorch's, and its layers, that are no longer called


@functools.cache
def rebinding(stock: type[nn.Module]) -> Rebinding | None:
    """Of the code of a class: of ``forward`` and the methods that it names; None where it calls no function of ours."""
    copies = _Copies(stock)
    methods: dict[str, Callable[[], FunctionType]] = {}
    left = ["forward"]
    seen = set(left)
    while left:
        function = inspect.getattr_static(stock, name := left.pop(), None)
        if not copies.may_follow(function):
            continue
        if copies[function] is not None:
            methods[name] = functools.partial(copies.of_method, name)
        named = {one for code in _codes(function.__code__) for one in code.co_names} - seen
        seen |= named
        left += sorted(named)
    return Rebinding(methods, tuple(copies.functions)) if methods else None


class _Copies(dict[FunctionType, "FunctionType | None"]):
    """By function of the package that a class is of, its copy; None where that would call nothing else."""

    def __init__(self, stock: type[nn.Module]) -> None:
        super().__init__()
        self.stock = stock
        self.functions: dict[str, None] = {}

    def may_follow(self, value: Any) -> bool:
        """Whether a value is a function of the package that the class is of."""
        return isinstance(value, FunctionType) and _root(value) == _root(self.stock)

    def of(self, function: FunctionType) -> FunctionType:
        """A function's copy, where it has one, and the code that was copied."""
        copy = self.get(function)
        return function if copy is None or copy.__code__ is not function.__code__ else copy

    def of_method(self, name: str) -> FunctionType:
        """The copy of a method that the class has now."""
        return self.of(getattr(self.stock, name))

    def __missing__(self, function: FunctionType) -> FunctionType | None:
        self[function] = None  # while it is looked at: it may call itself
        self[function] = copy = self._copy(function)
        return copy

    def _copy(self, function: FunctionType) -> FunctionType | None:
        codes = [*_codes(function.__code__)]
        written = {name for code in codes for name in _names(code, "STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF")}
        names = _Names(function, self)
        if not written <= {name for code in codes for name in code.co_cellvars} or "globals" in names.read:
            return None  # it would write to names of the copy's
        cells = tuple(self._cell(cell) for cell in function.__closure__ or ())
        served = [names.serves(path) for code in codes for path in _paths(code)]  # each is looked at
        if not any(served) and all(cell is own for cell, own in zip(cells, function.__closure__ or (), strict=True)):
            return None
        copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, cells)
        copy.__kwdefaults__ = function.__kwdefaults__
        functools.update_wrapper(copy, function)
        return copy

    def _cell(self, cell: CellType) -> CellType:
        """A cell with the copy of the function that is in this one; itself where that isn't one."""
        try:
            content = cell.cell_contents
        except ValueError:  # nothing is in it yet
            return cell
        copy = self[content] if self.may_follow(content) else None
        return cell if copy is None else CellType(copy)


class _Names(dict[str, Any]):
    """The names that a function reads from its Python module, where ours stand for PyTorch's."""

    def __init__(self, function: FunctionType, copies: _Copies) -> None:
        super().__init__(__name__=function.__module__)
        self._names, self._copies = function.__globals__, copies
        self.read = {name for code in _codes(function.__code__) for name in code.co_names}
        # Who asks what a layer is looks for PyTorch's class.
        self._makes_twins = self.read.isdisjoint(("isinstance", "issubclass", "type"))
        self._spaces = {module: _Namespace(module, self) for module in (torch, nn, nn.functional)}

    def __getitem__(self, name: str) -> Any:
        return self.other(self._names[name])

    def other(self, value: Any) -> Any:
        """What the copy reads for a value."""
        kind = type(value)
        if kind is FunctionType:
            return OURS.get(value) or self._copies.of(value)
        if kind is BuiltinFunctionType:
            return OURS.get(value, value)
        if kind is ModuleType:
            return self._spaces.get(value, value)
        return TWINS.get(value, value) if kind is type and self._makes_twins else value

    def serves(self, path: tuple[str, ...]) -> bool:
        """Whether another function or layer stands for what code finds by a name, and by attributes of what it is."""
        value: Any = self._names.get(path[0])
        for name in path[1:]:
            if type(value) is not ModuleType or value not in self._spaces:
                break
            value = getattr(value, name, None)
        if self._copies.may_follow(value):
            return self._copies[value] is not None
        if type(value) not in (FunctionType, BuiltinFunctionType, type):
            return False
        stock: Any = _STOCK.get(value, value)
        if stock not in OURS and self.other(value) is value:
            return False
        self._copies.functions[stock.__name__] = None
        return True


class _Namespace:
    """One of PyTorch's Python modules, in which some names are ours."""

    def __init__(self, module: ModuleType, names: _Names) -> None:
        self._module, self._names = module, names

    def __getattr__(self, name: str) -> Any:
        return self._names.other(getattr(self._module, name))


def _root(value: type | FunctionType) -> str:
    """The package that a class or a function is of."""
    return str(value.__module__).partition(".")[0]


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Code, and that of the functions within."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _names(code: CodeType, *operations: str) -> list[str]:
    """The names that instructions of these kinds have."""
    return [str(one.argval) for one in dis.get_instructions(code) if one.opname in operations]


def _paths(code: CodeType) -> Iterator[tuple[str, ...]]:
    """Global names with the attributes that are read of them, as ``("nn", "functional", "softmax")``."""
    path: tuple[str, ...] = ()
    for one in dis.get_instructions(code):
        if path and one.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            path = (*path, str(one.argval))
        elif one.opname != "EXTENDED_ARG":
            if path:
                yield path
            path = (str(one.argval),) if one.opname == "LOAD_GLOBAL" else ()
