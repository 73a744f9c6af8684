"""Reading the graph of a module's code, and everything outside of the graph that the code asked for on the way.

The code is run once with stand-ins: for its arguments (proxies of ``torch.fx``, which record what is done with them),
for the module and its children, and for the names that it reads from its Python module.  Each stand-in writes down what
it was asked: a later call may run the graph in place of the code where the answers would be the same (`Assumptions`).
Where a graph wouldn't tell of what the code is about to do, the stand-in raises `NotTraceable` instead of answering.
"""

from __future__ import annotations

import builtins
import dis
import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._jit_internal import is_scripting
from torch.fx.proxy import GraphAppendingTracer
from torch.utils import _pytree as pytree

__all__ = ["IN_PLACE", "Assumptions", "NotTraceable", "Trace", "calls_in_order", "stock_of", "trace"]


class NotTraceable(Exception):  # noqa: N818 (it is an answer, not an error)
    """The code can't be written as a graph, or does more than a graph would tell."""


def stock_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module before its neighbours were fused."""
    stock: type[nn.Module] = getattr(type(module), "_fusednn_stock", type(module))
    return stock


def calls_in_order(cls: type[nn.Module]) -> bool:
    """Whether a module's code is `nn.Sequential`'s: its children, one after another."""
    return cls.forward is nn.Sequential.forward and cls.__iter__ is nn.Sequential.__iter__  # type: ignore[attr-defined]


# --- What a graph took for granted ------------------------------------------------------------------------------------


class _Absent:
    """Stands for an attribute that there isn't."""


_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.Size)


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_constant(item) for item in value)
    return type(value) in _CONSTANTS


def _is_as_before(now: Any, then: Any) -> bool:
    if now is then:
        return True
    if isinstance(now, MethodType):  # made anew each time
        return now.__func__ is then
    if then is Tensor:
        return isinstance(now, Tensor)
    return type(now) is type(then) and _is_constant(now) and bool(now == then)


class _Seen(NamedTuple):
    """A value by its name somewhere: ``look_up(place, name, None)`` gave it."""

    look_up: Callable[..., Any]
    place: Any
    name: str
    value: Any


class Assumptions(NamedTuple):
    """The answers that a trace got, beside what its arguments were: what `hold` compares at each call.

    Modules are named by their path in the one whose code was traced, and come after the one that they are in.
    """

    surroundings: Callable[[], bool]  # whether its Python module, PyTorch's, its class and functions are as they were
    children: tuple[tuple[str, tuple[str, ...]], ...]  # by module, those of its children that were called
    entries: tuple[tuple[str, tuple[str, ...]], ...]  # all children of containers
    values: tuple[tuple[str, str, Any], ...]  # module, attribute, value; of tensors just that they are
    reads_mode: bool  # the code asked for training or evaluation, which the children then share

    def and_containers(self, module: nn.Module, paths: Iterable[str]) -> Assumptions:
        """These, and the entries of containers that are called in their container's place."""
        entries = tuple((path, tuple(module.get_submodule(path)._modules)) for path in paths)
        return self._replace(entries=self.entries + entries)

    def hold(self, module: nn.Module) -> bool:
        """Whether the code would get the same answers now."""
        if not self.surroundings():
            return False
        for path, names in self.children:
            owner = module.get_submodule(path) if path else module
            own, modules = owner.__dict__, owner._modules
            for name in names:
                if modules.get(name) is None or name in own:
                    return False
        for path, names in self.entries:
            modules = module.get_submodule(path)._modules if path else module._modules
            if tuple(modules) != names or None in modules.values():
                return False
        for path, name, value in self.values:
            owner = module.get_submodule(path) if path else module
            if not _is_as_before(getattr(owner, name, _Absent), value):
                return False
        return not self.reads_mode or all(child.training == module.training for child in module.children())


def _are_as_before(seen: tuple[_Seen, ...]) -> Callable[[], bool]:
    """Whether all that was seen is there still, as a function: code that is compiled asks once, while it is traced."""

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def are_as_before() -> bool:
        return all(look_up(place, name, None) is value for look_up, place, name, value in seen)

    function: Callable[[], bool] = are_as_before
    return function


class Trace(NamedTuple):
    """The graph of a module's code, called with arguments of these kinds, of which it ``asked`` for some."""

    graph: fx.Graph
    kinds: tuple[type, ...]
    asked: frozenset[int]
    assumptions: Assumptions


# --- Stand-ins --------------------------------------------------------------------------------------------------------


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

_CONTAINERS: tuple[Any, ...] = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class _Module:
    """Stands for a module, the one whose code runs or one inside it; ``cls`` is the class whose code it would run."""

    def __init__(self, recorder: _Recorder, module: nn.Module, path: str) -> None:
        self.__dict__["_stands_for"] = _Place(recorder, module, path)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        recorder, module, _ = self._stands_for
        if name in ("keys", "values", "items") and isinstance(module, nn.ModuleDict):
            return getattr(_entries(self, name), name)
        return recorder.read_attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise NotTraceable("its code does more than compute")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recorder, _, path = self._stands_for
        return recorder.create_proxy("call_module", path, args, kwargs)

    def __iter__(self) -> Iterator[Any]:
        entries = _entries(self, "__iter__")
        return iter(entries if isinstance(self._stands_for.module, nn.ModuleDict) else entries.values())

    def __len__(self) -> int:
        return len(_entries(self, "__len__"))

    def __getitem__(self, key: Any) -> Any:
        entries = _entries(self, "__getitem__")
        return entries[key] if isinstance(self._stands_for.module, nn.ModuleDict) else list(entries.values())[key]


class _Place(NamedTuple):
    """Whom a stand-in for a module answers to, which module, and its name in the one whose code runs."""

    recorder: _Recorder
    module: nn.Module
    path: str

    def within(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name


def _entries(container: _Module, method: str) -> dict[str, _Module]:
    """Stand-ins for the entries of a container, if ``method`` is that of PyTorch's container, and would give them."""
    recorder, module, path = place = container._stands_for
    base = next((cls for cls in _CONTAINERS if isinstance(module, cls)), None)
    children = module._modules
    if (
        base is None
        or getattr(stock_of(module), method, None) is not getattr(base, method)
        or None in children.values()
    ):
        raise NotTraceable(f"its code uses {method!r}")
    recorder.entries[path] = tuple(children)
    return {name: _Module(recorder, child, place.within(name)) for name, child in children.items() if child is not None}


class _Operation:
    """Stands for a function of PyTorch: its calls are recorded."""

    def __init__(self, recorder: _Recorder, function: Callable[..., Any], name: str) -> None:
        self._recorder, self._function, self._name = recorder, function, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
            args, kwargs = _by_name(self._function, args, kwargs)
            return self._recorder.create_proxy("call_function", self._function, args, kwargs)
        if self._function is is_scripting:
            return False  # a graph is never scripted
        if _root(getattr(self._function, "__module__", None)) in _ARITHMETIC:
            return self._function(*args, **kwargs)
        raise NotTraceable(f"its code uses {self._name!r}")


def _by_name(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a function that is written in Python: the first, and all others by their names."""
    if not isinstance(function, FunctionType):
        return args, kwargs
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in bound.signature.parameters.values()):
        return args, kwargs
    first, *rest = bound.arguments
    return (bound.arguments[first],), {name: bound.arguments[name] for name in rest}


class _Namespace:
    """Stands for one of PyTorch's Python modules."""

    def __init__(self, recorder: _Recorder, module: ModuleType) -> None:
        self._recorder, self._module = recorder, module

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        self._recorder.assume_around(getattr, self._module, name, value)
        return self._recorder.stand_in(value, name)


class _Globals(dict[str, Any]):
    """The names that a function reads from its Python module; each is looked up here when the function reads it."""

    def __init__(self, recorder: _Recorder, names: dict[str, Any]) -> None:
        super().__init__()
        self._recorder, self._names = recorder, names

    def __getitem__(self, name: str) -> Any:
        self._recorder.assume_around(dict.get, self._names, name, self._names.get(name))
        if name in self._names:
            return self._recorder.stand_in(self._names[name], name)
        return self._recorder.stand_in(getattr(builtins, name), name)


# --- The trace --------------------------------------------------------------------------------------------------------

_ARITHMETIC = ("math", "operator", "_operator")
_BUILTINS = (abs, all, any, enumerate, len, max, min, range, reversed, sum, zip)
_TYPES: tuple[Any, ...] = (bool, dict, float, int, list, str, tuple, Tensor)
_SIDE_EFFECTS = ("STORE_ATTR", "STORE_GLOBAL", "STORE_SUBSCR", "DELETE_ATTR", "DELETE_SUBSCR", "IMPORT_", "YIELD_")
_CONTEXTS = ("SETUP_", "BEFORE_WITH", "LOAD_SPECIAL", "PUSH_EXC_INFO")


class _Recorder(GraphAppendingTracer):
    """Runs code with stand-ins, and writes down what it does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(fx.Graph())
        self.module = module
        self.children: dict[str, dict[str, None]] = {}
        self.entries: dict[str, tuple[str, ...]] = {}
        self.values: dict[tuple[str, str], Any] = {}
        self.surroundings: dict[tuple[int, str], _Seen] = {}
        self.reads_mode = False
        self.kinds: dict[fx.Node, tuple[int, type]] = {}  # each argument: its place, and whether tensor or list
        self.asked: set[int] = set()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _InPlaceProxy(node, self)

    def create_arg(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            raise NotTraceable("its code makes tensors")
        return super().create_arg(argument)

    def run(self, function: FunctionType, kinds: tuple[type, ...]) -> Trace:
        """Trace ``function`` as the module's method, called with arguments of these kinds."""
        watched = self.watch(function)
        names = list(inspect.signature(function).parameters)[1:]
        arguments = [self.create_proxy("placeholder", name, (), {}) for name, _ in zip(names, kinds, strict=False)]
        self.kinds = {one.node: (place, kinds[place]) for place, one in enumerate(arguments)}
        return self.finish(watched(_Module(self, self.module, ""), *arguments), kinds)

    def finish(self, result: Any, kinds: tuple[type, ...]) -> Trace:
        self.graph.output(self.create_arg(result))
        for node in self.graph.nodes:
            if node.op == "call_method":
                self.assume_around(getattr, Tensor, node.target, getattr(Tensor, node.target, None))
        assumptions = Assumptions(
            surroundings=_are_as_before(tuple(self.surroundings.values())),
            children=tuple((path, tuple(names)) for path, names in self.children.items()),
            entries=tuple(self.entries.items()),
            values=tuple((*place, value) for place, value in self.values.items()),
            reads_mode=self.reads_mode,
        )
        return Trace(self.graph, kinds, frozenset(self.asked), assumptions)

    # What is taken for granted

    def assume_around(self, look_up: Callable[..., Any], place: Any, name: str, value: Any) -> None:
        self.surroundings[id(place), name] = _Seen(look_up, place, name, value)

    def watch(self, function: FunctionType) -> Callable[..., Any]:
        """``function``, with stand-ins for the names that it reads.  Raises NotTraceable where it isn't safe to run."""
        if function.__code__.co_freevars:
            raise NotTraceable(f"{function.__name__!r} is not a plain function")
        _check(function.__code__)
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            self.assume_around(getattr, function, name, getattr(function, name))
        names = _Globals(self, function.__globals__)
        watched = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
        watched.__kwdefaults__ = function.__kwdefaults__
        return watched

    # What stands for the values that code reads

    def read_attribute(self, owner: _Module, name: str, *default: Any) -> Any:
        place: _Place = owner._stands_for
        module, cls = place.module, stock_of(place.module)
        static = inspect.getattr_static(cls, name, None)
        if name == "training" and module is self.module:
            self.reads_mode = True
            return module.training
        if isinstance(static, property) or cls.__getattr__ is not nn.Module.__getattr__:
            raise NotTraceable(f"its code reads the property {name!r}")
        if name != "training" and hasattr(nn.Module, name):
            raise NotTraceable(f"its code uses {name!r}")
        value = getattr(module, name, _Absent)
        if isinstance(value, nn.Module) and name in module._modules:
            self.children.setdefault(place.path, {})[name] = None
            return _Module(self, value, place.within(name))
        if isinstance(value, Tensor):
            self.values[place.path, name] = Tensor
            return self.create_proxy("get_attr", place.within(name), (), {})
        if isinstance(value, MethodType):
            if value.__self__ is not module or not isinstance(value.__func__, FunctionType):
                raise NotTraceable(f"its code uses {name!r}")
            self.values[place.path, name] = value.__func__
            overridden = cls is not type(module) and value.__func__ is vars(type(module)).get(name)
            return functools.partial(self.watch(static if overridden else value.__func__), owner)
        self.values[place.path, name] = value
        if value is _Absent and default:
            return default[0]
        if _is_constant(value) or isinstance(value, FunctionType) or _is_operation(value):
            return self.stand_in(value, name)
        raise NotTraceable(f"its code reads the attribute {name!r}")

    def stand_in(self, value: Any, name: str) -> Any:
        """What the code gets for a value that isn't the module's."""
        questions: dict[Any, Any] = {isinstance: self.is_instance, getattr: self.get_attribute, hasattr: self.has}
        if isinstance(value, type):
            exception = issubclass(value, BaseException)
            if exception or value in _TYPES or (issubclass(value, tuple) and hasattr(value, "_fields")):
                return value
        elif isinstance(value, ModuleType):
            if _is_of_torch(value.__name__) or value.__name__ in _ARITHMETIC:
                return _Namespace(self, value)
        elif _is_constant(value) or any(value is known for known in _BUILTINS):
            return value
        elif any(value is question for question in questions):
            return questions[value]
        elif _is_operation(value):
            return _Operation(self, value, name)
        elif isinstance(value, FunctionType):
            return self.watch(value)
        raise NotTraceable(f"its code uses {name!r}")

    # Questions that Python answers

    def is_instance(self, value: Any, classes: Any) -> bool:
        if not isinstance(value, fx.Proxy):
            if isinstance(value, _Module | _Operation | _Namespace):
                raise NotTraceable("its code uses 'isinstance'")
            return isinstance(value, classes)
        classes = classes if isinstance(classes, tuple) else (classes,)
        if value.node not in self.kinds or not set(classes) <= {*_TYPES, type(None)}:
            raise NotTraceable("its code uses 'isinstance'")
        place, kind = self.kinds[value.node]
        self.asked.add(place)
        return kind in classes

    def get_attribute(self, value: Any, name: str, *default: Any) -> Any:
        if not isinstance(value, _Module):
            raise NotTraceable("its code uses 'getattr'")
        return self.read_attribute(value, name, *default)

    def has(self, value: Any, name: str) -> bool:
        return self.get_attribute(value, name, _Absent) is not _Absent


def trace(module: nn.Module, stock: type[nn.Module], training: bool, kinds: tuple[type, ...] | None = None) -> Trace:
    """The graph of the code of ``stock``, run on a module of it, in this mode.

    Called with an argument of each of ``kinds``, `Tensor` or ``list``: by default with a tensor for each argument that
    has no default value.  Raises NotTraceable.
    """
    recorder = _Recorder(module)
    function = inspect.getattr_static(stock, "forward")
    recorder.assume_around(getattr, stock, "forward", function)
    if calls_in_order(stock):
        recorder.assume_around(getattr, stock, "__iter__", stock.__iter__)  # type: ignore[attr-defined]
        value: Any = recorder.create_proxy("placeholder", "input", (), {})
        for child in _Module(recorder, module, ""):
            value = child(value)
        return recorder.finish(value, (Tensor,))
    if not isinstance(function, FunctionType):
        raise NotTraceable("'forward' is not a plain function")
    # Calls that give more by name run the module's own code.
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD][1:]
    if any(parameter.kind is not parameter.POSITIONAL_OR_KEYWORD for parameter in parameters):
        raise NotTraceable("it takes any number of arguments")
    if kinds is None:
        kinds = tuple(Tensor for parameter in parameters if parameter.default is parameter.empty)
    mode = module.training
    module.__dict__["training"] = training  # the children's stays: their code doesn't run
    try:
        return recorder.run(function, kinds)
    except NotTraceable:
        raise
    except Exception as error:  # the module's own code may raise anything when it is given proxies
        raise NotTraceable(f"its code can't be traced ({type(error).__name__})") from error
    finally:
        module.__dict__["training"] = mode


def _check(code: CodeType) -> None:
    """Raise NotTraceable where code does more than call and compute."""
    for instruction in dis.get_instructions(code):
        if instruction.opname.startswith(_CONTEXTS):
            raise NotTraceable("its code handles exceptions or contexts")
        if instruction.opname.startswith(_SIDE_EFFECTS):
            raise NotTraceable("its code does more than compute")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            _check(constant)


def _root(name: str | None) -> str | None:
    return None if name is None else name.split(".")[0]


def _is_of_torch(name: str | None) -> bool:
    return _root(name) == "torch"


def _is_operation(value: Any) -> bool:
    """Whether a value is a function of PyTorch, or of Python's arithmetic, whose calls can be recorded."""
    if isinstance(value, type) or not callable(value) or isinstance(value, nn.Module | Tensor):
        return False
    module = getattr(value, "__module__", None)
    return (
        _is_of_torch(module)
        or _root(module) in _ARITHMETIC
        or getattr(torch, getattr(value, "__name__", ""), 0) is value
    )
