"""Fusing neighbouring layers of a module: the subclass of its class that runs its code with chains in it.

The module becomes an instance of a subclass of its class (`Fused`), whose ``forward`` runs the graph of its own code
with a single call for each chain (`fusednn.layers.fusion.patterns`).  Its children stay what they are, where they are.
For any call that isn't like those that the graph was traced from, the module's own ``forward`` runs, in which ours take
the place of PyTorch's functions (`fusednn.layers.fusion.rebinding`).
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import fx, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from ...autograd.dispatch import is_beyond_kernels
from ...autograd.recompute import recompute
from ..derived import beneath, rebased
from ..twin import Layer, is_untouched
from .patterns.pattern import complete
from .rebinding import OURS, rebinding
from .search import Refusal, Search, begins_a_chain
from .steady import is_known, is_plain_container, is_steady, keeps_to_itself
from .trace import Assumptions, NotTraceable, Trace, calls_in_order, stock_of, trace

__all__ = [
    "Fused",
    "Fusion",
    "fuse_neighbours",
    "is_searched",
    "recompute_in",
    "recomputes",
    "serve_functions",
    "unfuse",
    "why_apart",
]

_PLAN = "_fusednn_plan"
#: Marks a module in whose code ours take the place of PyTorch's functions.
_FUNCTIONS = "_fusednn_functions"
#: Marks a module whose forward pass is one of `fusednn.recompute`, with its options.
_RECOMPUTE = "_fusednn_recompute"


class Variant(NamedTuple):
    """A module's code for calls that are alike, as a function of the module and its arguments."""

    training: bool | None  # None: in both modes
    kinds: tuple[type, ...]  # what its arguments are: tensors, or lists
    assumptions: Assumptions
    inlined: tuple[str, ...]  # containers whose children are called in their place
    moved: tuple[str, ...]  # layers that are called before those that they stood behind
    steady: tuple[str, ...]  # those of them that mustn't change anything
    run: Callable[..., Any]

    def fits(self, module: nn.Module, args: tuple[Any, ...]) -> bool:
        """Whether the module's code would do for these arguments what it did when it was traced."""
        if (self.training is not None and self.training != module.training) or len(args) != len(self.kinds):
            return False
        for argument, kind in zip(args, self.kinds, strict=True):
            if not isinstance(argument, kind):
                return False
        if not self.assumptions.hold(module):
            return False
        if not (self.inlined or self.moved):
            return True
        return (
            all(is_plain_container(module.get_submodule(path)) for path in self.inlined)
            and all(keeps_to_itself(module.get_submodule(path)) for path in self.moved)
            and all(is_steady(module.get_submodule(path)) for path in self.steady)
        )


@dataclass(frozen=True)
class Plan:
    """How a fused module runs.  It names layers and holds none, so copies of a module share it."""

    chains: tuple[tuple[str, ...], ...]  # the names of the layers of each
    variants: tuple[Variant, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of all layers that are fused."""
        return tuple(dict.fromkeys(name for names in self.chains for name in names))

    def variant(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant | None:
        """What to run for these arguments; None where the module's own code has to."""
        if kwargs:
            return None
        for variant in self.variants:
            if variant.fits(module, args):
                return variant
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Functions that were generated can't be pickled: the layers' names suffice to generate them again.
        return tuple, (self.layers,)


class Fused(nn.Module):
    """What every fused module is besides: an instance of a subclass of its class, with another ``forward``."""

    #: The class that the module was of.
    _fusednn_stock: ClassVar[type[nn.Module]]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        plan = self.__dict__.get(_PLAN)
        if isinstance(plan, tuple):  # the names of its layers, from a pickle
            self.__dict__[_PLAN] = _search(self, self._fusednn_stock, _all_but(plan))[0]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        function, arguments, *rest = reduced
        if function is copyreg.__newobj__ and arguments[0] is type(self):  # type: ignore[attr-defined]
            return _new, (self._fusednn_stock,), *rest  # pickle wouldn't find the class by its name
        return reduced

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in our place: the module as it was."""
        stock = self._fusednn_stock.__new__(self._fusednn_stock)
        stock.__dict__.update({name: value for name, value in self.__dict__.items() if name != _PLAN})
        stock.__dict__["_modules"] = self._modules.copy()  # whose entries it replaces, too
        return stock


_classes: dict[type[nn.Module], type[Fused]] = {}


def fused_class(stock: type[nn.Module]) -> type[Fused]:
    """The subclass of ``stock`` that its fused instances are of; it goes by the same name.  Raises NotTraceable."""
    if stock not in _classes:
        try:
            _classes[stock] = _subclass(stock)
        except Exception as error:  # a class may run any code when another is derived from it
            raise NotTraceable(f"no class can be derived from its class ({type(error).__name__})") from error
    return _classes[stock]


def _subclass(stock: Any) -> type[Fused]:
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if args and is_beyond_kernels(args[0]):  # there is nothing to win, whatever chains there are
            return stock.forward(self, *args, **kwargs)
        plan = self.__dict__.get(_PLAN)  # a slice of a fused nn.Sequential has none
        variant = None if plan is None else plan.variant(self, args, kwargs)
        if variant is not None:
            return variant.run(self, *args)
        return stock.forward(self, *args, **kwargs) if code is None else code(self, *args, **kwargs)

    @functools.wraps(stock.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        options = self.__dict__.get(_RECOMPUTE)
        if options is None or torch.compiler.is_compiling():
            return run(self, *args, **kwargs)
        with recompute(self, **options):
            return run(self, *args, **kwargs)

    rebound = rebinding(stock)
    methods = {} if rebound is None else {name: _method(stock, name, copy) for name, copy in rebound.methods.items()}
    code = methods.get("forward")
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    return type(stock.__name__, (Fused, stock), {**names, **methods, "_fusednn_stock": stock, "forward": forward})


def _method(stock: Any, name: str, copied: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """A method of a class; of a module that is marked so, the copy that calls functions of ours.

    Compilers and tracers, which look for what code calls, get the method.
    """

    @functools.wraps(getattr(stock, name))
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if _FUNCTIONS not in self.__dict__ or torch.compiler.is_compiling() or is_fx_symbolic_tracing():
            return getattr(stock, name)(self, *args, **kwargs)
        return copied()(self, *args, **kwargs)

    return call


def _new(stock: type[nn.Module]) -> nn.Module:
    cls = fused_class(stock)
    module: nn.Module = cls.__new__(cls)
    return module


def _all_but(names: tuple[str, ...]) -> Refusal:
    return lambda name, layer: None if name in names and is_untouched(layer) else "not fused before"


# --- Plans ------------------------------------------------------------------------------------------------------------


def _search(module: nn.Module, stock: type[nn.Module], refuses: Refusal) -> tuple[Plan, dict[nn.Module, str]]:
    """The plan of a module whose class is, or was, ``stock``; why chains aren't longer.  Raises NotTraceable."""
    chains: dict[tuple[str, ...], None] = {}
    stops: dict[nn.Module, str] = {}
    variants = []
    for mode, found in _traces(module, stock):
        search = Search(module, found.graph, refuses)
        chains |= dict.fromkeys(search.layers(match) for match in search.matches)
        stops |= search.stops
        assumptions = found.assumptions.and_containers(module, search.inlined)
        if _FUNCTIONS in module.__dict__:
            for node in found.graph.nodes:
                node.target = OURS.get(node.target, node.target) if node.op == "call_function" else node.target
        run = _function(found.graph, search)
        paths = (tuple(search.inlined), tuple(search.moved), tuple(search.steady))
        variants.append(Variant(mode, found.kinds, assumptions, *paths, run))
    return Plan(tuple(chains), tuple(variants)), stops


def _traces(module: nn.Module, stock: type[nn.Module]) -> list[tuple[bool | None, Trace]]:
    """The traces of the code of ``stock``: in training and in evaluation, or None for both.

    Where the code asks whether an argument is a list, once with a list, too.  Raises NotTraceable where there is none.
    """
    found: list[tuple[bool | None, Trace]] = []
    errors: list[NotTraceable] = []

    def attempt(mode: bool, kinds: tuple[type, ...] | None) -> Trace | None:
        try:
            traced = trace(module, stock, mode, kinds)
        except NotTraceable as error:
            errors.append(error)
            return None
        found.append((mode if traced.assumptions.reads_mode else None, traced))
        return traced

    first = attempt(True, None)
    for kinds in [None] if first is None else [first.kinds, *_with_lists(first)]:
        traced = first if first is not None and kinds is first.kinds else attempt(True, kinds)
        if traced is None or traced.assumptions.reads_mode:
            attempt(False, kinds)
    if not found:
        raise errors[0]
    return found


def _with_lists(traced: Trace) -> list[tuple[type, ...]]:
    """Kinds of arguments in which one whose type was asked for is a list."""
    return [(*traced.kinds[:place], list, *traced.kinds[place + 1 :]) for place in sorted(traced.asked)]


def _function(graph: fx.Graph, search: Search) -> Callable[..., Any]:
    """The graph as a function, with a single call for each chain."""
    made: dict[Any, fx.Node] = {}
    for match in search.matches:
        last = match.nodes[-1]
        between = search.between(match)
        names = {search.callee(node): node.target for node in match.nodes if node.op == "call_module"}
        operands = tuple(made.get(one, one) if isinstance(one, fx.Node) else one for one in match.operands)
        with graph.inserting_before(match.nodes[match.begun - 1] if between else last):
            members: dict[str, Any] = {
                name: graph.create_node("get_attr", names[one]) if isinstance(one, nn.Module) else one
                for name, one in match.members.items()
            }
            if match.begin is not None and between:
                members["between"] = tuple(graph.create_node("get_attr", path) for path in between)
                begun = graph.call_function(match.begin, operands[:-1], members)
        with graph.inserting_before(last):
            if between:
                made[last] = graph.call_function(complete, (begun, operands[-1]))
            else:
                made[last] = graph.call_function(match.function, operands, members)
        last.replace_all_uses_with(made[last])
        for node in reversed(match.nodes):
            graph.erase_node(node)
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, f"<fused {type(search.module).__name__}>", "exec"), namespace)
    function: Callable[..., Any] = namespace["forward"]
    return function


# --- Modules ----------------------------------------------------------------------------------------------------------


@dataclass
class Fusion:
    """What `fuse_neighbours` did with a module: the chains that are new, each a list of its layers.

    ``stops`` tells of layers why their chain isn't longer, ``untraced`` why the code can't be searched at all.
    """

    chains: list[list[nn.Module]] = field(default_factory=list)
    stops: dict[nn.Module, str] = field(default_factory=dict)
    untraced: str | None = None


def is_searched(module: nn.Module) -> bool:
    """Whether neighbours are looked for in a module's code: not PyTorch's; it calls such layers, or none at all."""
    own = calls_in_order(stock_of(module)) or not is_known(module)
    if not own or isinstance(module, (nn.ModuleList, nn.ModuleDict, fx.GraphModule, torch.jit.ScriptModule)):
        return False
    return not module._modules or _calls_layers(module)


def _calls_layers(module: nn.Module) -> bool:
    """Whether a module has layers that a chain can begin with."""
    return any(begins_a_chain(layer) for layer in _called(module))


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """The children, and those of containers among them."""
    for child in module.children():
        yield child
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) or is_plain_container(child):
            yield from _called(child)


def fuse_neighbours(module: nn.Module, refuses: Refusal) -> Fusion:
    """Fuse neighbouring layers in the code of one module, in place; the code of its children isn't looked at.

    Layers that ``refuses`` gives a reason for are left out, unless they are fused already.
    """
    stock = stock_of(module)
    old = module.__dict__.get(_PLAN)
    fused = () if old is None else old.layers
    try:
        if "forward" in module.__dict__:
            raise NotTraceable("forward is overridden on the instance")
        if isinstance(module, Fused) and type(module) is not fused_class(stock):
            raise NotTraceable("its class was changed after it was fused")
        plan, stops = _search(module, stock, lambda name, layer: None if name in fused else refuses(name, layer))
        if plan.chains:
            module.__class__ = fused_class(stock)
            module.__dict__[_PLAN] = plan
    except NotTraceable as error:
        return Fusion(untraced=str(error) if _calls_layers(module) else None)
    new = [names for names in plan.chains if names and (old is None or names not in old.chains)]
    return Fusion([[module.get_submodule(name) for name in names] for names in new], stops)


def why_apart(module: nn.Module, refuses: Refusal) -> dict[nn.Module, str]:
    """Why chains in the code of one module aren't longer, by layer, as `fuse_neighbours` finds it; changes nothing."""
    if not is_searched(module) or "forward" in module.__dict__:
        return {}
    try:
        _, stops = _search(module, stock_of(module), refuses)
    except NotTraceable:
        return {}
    return stops


def serve_functions(module: nn.Module) -> tuple[str, ...]:
    """Put ours in the place of PyTorch's functions in the code of one module; returns the names of those that it calls.

    Code that is PyTorch's is left alone.
    """
    stock: Any = stock_of(module)
    generated = isinstance(module, (fx.GraphModule, torch.jit.ScriptModule))
    if generated or is_known(module) or calls_in_order(stock) or "forward" in module.__dict__:
        return ()
    rebound = rebinding(stock)
    if rebound is None:
        return ()
    try:
        fused = fused_class(stock)
    except NotTraceable:  # no class can be derived from it
        return ()
    if not isinstance(module, Fused):
        module.__class__ = fused
    module.__dict__[_FUNCTIONS] = True
    return rebound.functions


def recompute_in(module: nn.Module, **options: Any) -> str | None:
    """Put `fusednn.recompute` with these options into a module's own forward; returns why it can't be, or None."""
    stock = stock_of(module)
    if issubclass(stock, Layer):
        return "a single layer"
    if "forward" in module.__dict__:
        return "forward is overridden on the instance"
    try:
        fused = fused_class(stock)
    except NotTraceable as error:
        return str(error)
    if not isinstance(module, Fused):
        module.__class__ = fused
    module.__dict__[_RECOMPUTE] = options
    return None


def recomputes(module: nn.Module) -> bool:
    """Whether `recompute_in` was done to a module."""
    return _RECOMPUTE in module.__dict__


def unfuse(module: nn.Module) -> list[nn.Module]:
    """Undo `fuse_neighbours`, `serve_functions` and `recompute_in`; returns the layers that were fused."""
    if not isinstance(module, Fused):
        return []
    for mark in (_RECOMPUTE, _FUNCTIONS):
        module.__dict__.pop(mark, None)
    plan = module.__dict__.pop(_PLAN, None)
    stock: Any = module._fusednn_stock
    fused = fused_class(stock)
    if beneath(type(module)) is fused:  # else others have made a subclass of it: it runs the stock code
        module.__class__ = rebased(type(module), fused, stock)
    return [] if plan is None else [module.get_submodule(name) for name in plan.layers]
