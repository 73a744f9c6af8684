"""Reading the graph of a module's code, with ``torch.fx``, and judging whether the graph is all that the code does."""

from __future__ import annotations

import builtins
import dis
import inspect
import operator
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from .twin import Twin

__all__ = ["IN_PLACE", "Assumptions", "Code", "LayerTracer", "NotTraceable", "calls_in_order", "code_graph"]


class LayerTracer(fx.Tracer):
    """Layers are leaves of the graph: PyTorch's, ours, and whatever has no children."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        childless = not any(True for _ in module.children())
        return childless or isinstance(module, Twin) or super().is_leaf_module(module, name)


class NotTraceable(Exception):  # noqa: N818 (it is an answer, not an error)
    """The code can't be written as a graph, or does more than a graph would tell."""


# --- The graph of one module's own code -------------------------------------------------------------------------------


class _InPlaceProxy(fx.Proxy):
    """Records ``x += y`` as what it is; the stock proxy makes x = x + y of it, which leaves other names of x alone."""


def _in_place(function: Any) -> Any:
    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


#: x += y and its like.
IN_PLACE = (
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod),
    *(operator.ipow, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift, operator.imatmul),
)
for _function in IN_PLACE:
    setattr(_InPlaceProxy, f"__{_function.__name__}__", _in_place(_function))


class _CodeTracer(fx.Tracer):
    """All children are leaves: the graph is that of the module's own code."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _InPlaceProxy(node, self)

    def create_arg(self, argument: Any) -> Any:
        named = isinstance(argument, nn.Parameter) or any(argument is buffer for buffer in self.root.buffers())
        if isinstance(argument, Tensor) and not named:
            raise NotTraceable("its code makes tensors")
        return super().create_arg(argument)


def calls_in_order(cls: type[nn.Module]) -> bool:
    """Whether a module's code is `nn.Sequential`'s: its children, one after another."""
    return cls.forward is nn.Sequential.forward and cls.__iter__ is nn.Sequential.__iter__  # type: ignore[attr-defined]


def code_graph(module: nn.Module) -> fx.Graph:
    """The graph of the module's own code, called with a tensor for each argument that has no default value.

    The code is run, so `Code` should have judged it first.  Raises NotTraceable.
    """
    if calls_in_order(type(module)):
        return _sequential_graph(module)
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if any(parameter.kind is not parameter.POSITIONAL_OR_KEYWORD for parameter in parameters):
        raise NotTraceable("it takes any number of arguments")
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    if not all(_is_constant(default) for default in defaults.values()):
        raise NotTraceable("a default argument is not a constant")
    try:
        graph = _CodeTracer().trace(module, concrete_args=defaults)
    except NotTraceable:
        raise
    except Exception as error:  # the module's own code may raise anything when it is given proxies
        raise NotTraceable(f"its code can't be traced ({type(error).__name__})") from error
    _drop_defaults(graph, len(parameters) - len(defaults))
    return graph


def _sequential_graph(module: nn.Module) -> fx.Graph:
    graph = fx.Graph()
    value = graph.placeholder("input")
    for name in module._modules:
        value = graph.call_module(name, (value,))
    graph.output(value)
    return graph


def _drop_defaults(graph: fx.Graph, required: int) -> None:
    """Take the arguments after the first ``required`` ones out of the graph, and the checks of their values."""
    optional = [node for node in graph.nodes if node.op == "placeholder"][required:]
    for node in optional:
        for user in list(node.users):
            for check in list(user.users):
                graph.erase_node(check)
            graph.erase_node(user)
        graph.erase_node(node)


# --- What the graph doesn't tell --------------------------------------------------------------------------------------

_CONSTANTS = (bool, int, float, str, type(None))
_BUILTINS = {"enumerate", "len", "list", "range", "reversed", "tuple", "zip"}
_NAMESPACES = {"functional", "jit", "nn", "is_scripting"}
_SIDE_EFFECTS = ("STORE_ATTR", "STORE_GLOBAL", "STORE_SUBSCR", "DELETE_", "IMPORT_", "YIELD_", "SETUP_", "BEFORE_WITH")


class Assumptions(NamedTuple):
    """What a graph took for granted, beside that each argument without a default is given, as a tensor.

    The module's constants, and which of its other attributes there are (of containers: with how many entries); and
    whether the code asked for the mode, training or evaluation, which the children then share.
    """

    constants: tuple[tuple[str, Any], ...]
    present: tuple[tuple[str, int], ...]
    reads_mode: bool

    def hold(self, module: nn.Module) -> bool:
        for name, value in self.constants:
            if getattr(module, name, None) != value:
                return False
        for name, size in self.present:
            if _presence(getattr(module, name, None)) != size:
                return False
        return not self.reads_mode or all(child.training == module.training for child in module.children())


class Code:
    """What the code of a class, run on a module of it, names.  Raises NotTraceable where that isn't safe to trace.

    Every name has to be an attribute of the module, or an operation that the graph records (`explained_by`).
    """

    def __init__(self, module: nn.Module, stock: type[nn.Module]) -> None:
        self.constants: dict[str, Any] = {}
        self.present: dict[str, int] = {}
        self._functions: dict[str, Any] = {}
        self._others: set[str] = set()
        if calls_in_order(stock):
            return
        for function in _own_functions(stock):
            for kind, name in _names(function.__code__):
                if kind == "global":
                    self._read_global(name, function.__globals__.get(name, getattr(builtins, name, None)))
                else:
                    self._read_attribute(name, module, inspect.getattr_static(stock, name, None))

    def _read_global(self, name: str, value: Any) -> None:
        exception = isinstance(value, type) and issubclass(value, BaseException)
        if name in _BUILTINS or exception or (isinstance(value, ModuleType) and _is_of_torch(value.__name__)):
            return
        if not _is_torch_function(value):
            raise NotTraceable(f"its code uses {name!r}")
        self._functions[name] = value

    def _read_attribute(self, name: str, module: nn.Module, static: Any) -> None:
        if isinstance(static, property):
            raise NotTraceable(f"its code reads the property {name!r}")
        if not hasattr(module, name) or (hasattr(nn.Module, name) and name != "training"):
            self._others.add(name)
        elif not isinstance(static, FunctionType):  # methods are read as code
            value = getattr(module, name)
            if _is_torch_function(value):
                self._functions[name] = value
            elif not (_is_constant(value) or isinstance(value, nn.Module | Tensor)):
                raise NotTraceable(f"its code reads the attribute {name!r}")
            if isinstance(value, nn.Module | Tensor | None):
                self.present[name] = _presence(value)
            else:
                self.constants[name] = value

    def explained_by(self, graphs: Iterable[fx.Graph]) -> Assumptions:
        """What ``graphs``, traced from the code, take for granted.  Raises NotTraceable where a name isn't theirs."""
        functions, operations = set(), set(_NAMESPACES)
        for node in (node for graph in graphs for node in graph.nodes):
            if node.op == "call_function":
                functions.add(node.target)
                operations |= {getattr(node.target, "__name__", ""), node.name.rstrip("0123456789").rstrip("_")}
                operations |= {argument for argument in node.args if isinstance(argument, str)}
            elif node.op == "call_method":
                operations.add(str(node.target))
        unknown = [name for name, value in self._functions.items() if value not in functions]
        unknown += sorted(self._others - operations)
        if unknown:
            raise NotTraceable(f"its code uses {unknown[0]!r}")
        constants = tuple((name, value) for name, value in self.constants.items() if name != "training")
        return Assumptions(constants, tuple(self.present.items()), "training" in self.constants)


def _own_functions(stock: type[nn.Module]) -> Iterator[FunctionType]:
    """``forward``, and the methods that it calls."""
    waiting, seen = ["forward"], set()
    while waiting:
        name = waiting.pop()
        function = inspect.getattr_static(stock, name)
        if not isinstance(function, FunctionType) or function.__code__.co_freevars:
            raise NotTraceable(f"{name!r} is not a plain method")
        seen.add(name)
        yield function
        for kind, other in _names(function.__code__):
            own = inspect.getattr_static(stock, other, None) if kind == "attribute" else None
            if callable(own) and not hasattr(nn.Module, other) and other not in seen and other not in waiting:
                waiting.append(other)


def _names(code: CodeType) -> Iterator[tuple[str, str]]:
    """The names that code reads: (``"global"`` or ``"attribute"``, name)."""
    if getattr(code, "co_exceptiontable", b""):
        raise NotTraceable("its code handles exceptions or contexts")
    for instruction in dis.get_instructions(code):
        if instruction.opname.startswith(_SIDE_EFFECTS):
            raise NotTraceable("its code does more than compute")
        if instruction.opname.startswith(("LOAD_GLOBAL", "LOAD_NAME")):
            yield "global", instruction.argval
        elif instruction.opname.startswith(("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER")):
            yield "attribute", instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_of_torch(name: str | None) -> bool:
    return name is not None and name.split(".")[0] in ("torch", "operator", "_operator")


def _is_torch_function(value: Any) -> bool:
    """Whether a value is a function of PyTorch, whose calls a tracer records."""
    if isinstance(value, type) or not callable(value) or isinstance(value, nn.Module | Tensor):
        return False
    return (
        _is_of_torch(getattr(value, "__module__", None)) or getattr(torch, getattr(value, "__name__", ""), 0) is value
    )


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_constant(item) for item in value)
    return type(value) in _CONSTANTS


def _presence(value: Any) -> int:
    """-1 for None, the size of a container of modules, else 1."""
    if value is None:
        return -1
    return len(value) if isinstance(value, nn.ModuleList | nn.ModuleDict | nn.Sequential) else 1
