"""Fusing neighbouring layers of a module: the subclass of its class that runs its code with chains in it.

The module becomes an instance of a subclass of its class (`Fused`), whose ``forward`` runs the graph of its own code
with a single call for each chain (`fusednn.layers.chain`).  Its children stay what they are, where they are.  For any
call that isn't like those that the graph was traced from, the module's own ``forward`` runs.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, fx, nn

from .chain import is_one_of, is_untouched
from .derived import beneath, rebased
from .graph import Assumptions, Code, NotTraceable, calls_in_order, code_graph
from .neighbours import FIRST, Refusal, Search, is_known

__all__ = ["Fused", "Fusion", "fuse_neighbours", "is_searched", "unfuse"]

_PLAN = "_fusednn_plan"


class Variant(NamedTuple):
    """A module's code in training, in evaluation, or (None) in both, as a function of the module and its arguments."""

    training: bool | None
    run: Callable[..., Any]


@dataclass(frozen=True)
class Plan:
    """How a fused module runs.  It names layers and holds none, so copies of a module share it."""

    chains: tuple[tuple[str, ...], ...]  # the names of the layers of each
    variants: tuple[Variant, ...]
    assumptions: Assumptions
    children: tuple[str, ...] | None  # of a module whose code is to call them all in order
    arguments: int

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of all layers that are fused."""
        return tuple(dict.fromkeys(name for names in self.chains for name in names))

    def variant(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant | None:
        """What to run for these arguments; None where the module's own code has to."""
        if kwargs or len(args) != self.arguments or not all(isinstance(argument, Tensor) for argument in args):
            return None
        if self.children is not None and self.children != tuple(module._modules):
            return None
        if not self.assumptions.hold(module):
            return None
        for variant in self.variants:
            if variant.training is None or variant.training == module.training:
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
    stock: ClassVar[type[nn.Module]]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        plan = self.__dict__.get(_PLAN)
        if isinstance(plan, tuple):  # the names of its layers, from a pickle
            self.__dict__[_PLAN] = _search(self, self.stock, _all_but(plan))[0]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        function, arguments, *rest = reduced
        if function is copyreg.__newobj__ and arguments[0] is type(self):  # type: ignore[attr-defined]
            return _new, (self.stock,), *rest  # pickle wouldn't find the class by its name
        return reduced

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in our place: the module as it was."""
        stock = self.stock.__new__(self.stock)
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
    @functools.wraps(stock.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plan = self.__dict__.get(_PLAN)  # a slice of a fused nn.Sequential has none
        variant = None if plan is None else plan.variant(self, args, kwargs)
        return stock.forward(self, *args, **kwargs) if variant is None else variant.run(self, *args)

    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    return type(stock.__name__, (Fused, stock), {**names, "stock": stock, "forward": forward})


def _new(stock: type[nn.Module]) -> nn.Module:
    cls = fused_class(stock)
    module: nn.Module = cls.__new__(cls)
    return module


def _all_but(names: tuple[str, ...]) -> Refusal:
    return lambda name, layer: None if name in names and is_untouched(layer) else "not fused before"


# --- Plans ------------------------------------------------------------------------------------------------------------


def _search(module: nn.Module, stock: type[nn.Module], refuses: Refusal) -> tuple[Plan, dict[nn.Module, str]]:
    """The plan of a module whose class is, or was, ``stock``; why chains aren't longer.  Raises NotTraceable."""
    code = Code(module, stock)
    graphs = _graphs_of_modes(module, stock)
    assumptions = code.explained_by(graphs.values())
    modes = (True, False) if assumptions.reads_mode else (None,)
    searches = {mode: Search(module, graphs[bool(mode)], refuses) for mode in modes}
    plan = Plan(
        chains=tuple({search.layers(match): None for search in searches.values() for match in search.matches}),
        variants=tuple(Variant(mode, _function(graphs[bool(mode)], search)) for mode, search in searches.items()),
        assumptions=assumptions,
        children=tuple(module._modules) if calls_in_order(stock) else None,
        arguments=sum(node.op == "placeholder" for node in graphs[False].nodes),
    )
    return plan, {layer: reason for search in searches.values() for layer, reason in search.stops.items()}


def _graphs_of_modes(module: nn.Module, stock: type[nn.Module]) -> dict[bool, fx.Graph]:
    """The graphs of the code of ``stock`` in training and in evaluation."""
    cls, training = type(module), module.training
    module.__class__ = stock
    try:
        graphs = {}
        for mode in (True, False):
            module.__dict__["training"] = mode  # the children's stays: the tracer doesn't run them
            graphs[mode] = code_graph(module)
        return graphs
    finally:
        module.__dict__["training"] = training
        module.__class__ = cls


def _function(graph: fx.Graph, search: Search) -> Callable[..., Any]:
    """The graph as a function, with a single call for each chain."""
    made: dict[Any, fx.Node] = {}
    for match in search.matches:
        last = match.nodes[-1]
        names = {search.callee(node): node.target for node in match.nodes if node.op == "call_module"}
        with graph.inserting_before(last):
            arguments: list[Any] = [made.get(one, one) if isinstance(one, fx.Node) else one for one in match.arguments]
            for place, argument in enumerate(arguments):
                if isinstance(argument, nn.Module):
                    arguments[place] = graph.create_node("get_attr", names[argument])
            made[last] = graph.call_function(match.function, tuple(arguments))
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
    """Whether neighbours are looked for in a module's code: where that isn't PyTorch's and calls such layers."""
    containers = (nn.ModuleList, nn.ModuleDict)
    own = calls_in_order(_stock_of(module)) or not is_known(module)
    if not own or isinstance(module, (*containers, fx.GraphModule, torch.jit.ScriptModule)):
        return False
    children = list(module.children())
    children += [layer for child in children if isinstance(child, containers) for layer in child.children()]
    return any(is_one_of(child, FIRST) for child in children)


def fuse_neighbours(module: nn.Module, refuses: Refusal) -> Fusion:
    """Fuse neighbouring layers in the code of one module, in place; the code of its children isn't looked at.

    Layers that ``refuses`` gives a reason for are left out, unless they are fused already.
    """
    stock = _stock_of(module)
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
        return Fusion(untraced=str(error))
    new = [names for names in plan.chains if old is None or names not in old.chains]
    return Fusion([[module.get_submodule(name) for name in names] for names in new], stops)


def unfuse(module: nn.Module) -> list[nn.Module]:
    """Undo `fuse_neighbours`; returns the layers that were fused."""
    if not isinstance(module, Fused):
        return []
    plan = module.__dict__.pop(_PLAN, None)
    stock: Any = module.stock
    fused = fused_class(stock)
    if beneath(type(module)) is fused:  # else others have made a subclass of it: it runs the stock code
        module.__class__ = rebased(type(module), fused, stock)
    return [] if plan is None else [module.get_submodule(name) for name in plan.layers]


def _stock_of(module: nn.Module) -> type[nn.Module]:
    return module.stock if isinstance(module, Fused) else type(module)
