"""Finding neighbouring layers in the graph of a module's code: which calls can become one of a chain."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, fx, nn

from ..autograd import stock as F
from . import chain
from .chain import ACTIVATIONS, NORMS, activation_of, is_one_of, pieces_of, pooling_of
from .graph import IN_PLACE, calls_in_order, stock_of
from .twin import Layer, is_untouched

__all__ = ["FIRST", "Match", "Refusal", "Search", "begins_a_chain", "is_known", "is_plain_container", "keeps_to_itself"]

#: Why a layer, given its name in the module, must not be fused, or None.
Refusal = Callable[[str, nn.Module], str | None]

#: The layers that a chain begins with, those that follow, and all.
FIRST = (nn.Conv2d, nn.Linear, *NORMS)
_FOLLOWING = (*NORMS, *ACTIVATIONS, nn.MaxPool1d, nn.MaxPool2d, nn.Dropout)
CHAINED = (*FIRST, *_FOLLOWING)

_Found = TypeVar("_Found")


class Match(NamedTuple):
    """Calls that become one: their nodes, first to last, and the function of (values, layers, constants) for them."""

    nodes: list[fx.Node]
    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]


class Search:
    """The chains of a module's graph, and for layers whose chain ends or isn't one, the reason."""

    def __init__(self, module: nn.Module, graph: fx.Graph, refuses: Refusal) -> None:
        self.module = module
        self.refuses = refuses
        self.inlined: list[str] = []  # containers whose calls became those of their children
        self.moved: set[str] = set()  # modules that are called before layers of a chain that they stood behind
        self._expand(graph)
        self.nodes = list(graph.nodes)
        self.matches: list[Match] = []
        self.stops: dict[nn.Module, str] = {}
        self._taken: set[fx.Node] = set()
        for node in self.nodes:
            match = None if node in self._taken else self._match(node)
            if match is not None and len(match.nodes) > 1:
                self._taken.update(match.nodes)
                self.matches.append(match)

    def callee(self, node: fx.Node) -> nn.Module:
        """The module that a node calls."""
        return self.module.get_submodule(str(node.target))

    def layers(self, match: Match) -> tuple[str, ...]:
        """The names of a match's layers."""
        return tuple(str(node.target) for node in match.nodes if node.op == "call_module")

    # A container's border is no border to a chain.

    def _expand(self, graph: fx.Graph) -> None:
        """Call the children of containers in their place where a chain would cross the container's border."""
        waiting = [node for node in graph.nodes if node.op == "call_module"]
        for node in waiting:
            container = self.callee(node)
            if len(node.args) != 1 or node.kwargs or not is_plain_container(container):
                continue
            if not (self._reaches_behind(node, container) or self._reaches_before(node, container)):
                continue
            self.inlined.append(str(node.target))
            value: Any = node.args[0]
            with graph.inserting_before(node):
                for name in container._modules:
                    value = graph.create_node("call_module", f"{node.target}.{name}", (value,))
                    waiting.append(value)
            node.replace_all_uses_with(value)
            graph.erase_node(node)

    def _reaches_behind(self, node: fx.Node, container: nn.Module) -> bool:
        """Whether a chain may begin in a container and end behind it."""
        if not is_one_of(_end(container, -1), CHAINED) or len(node.users) != 1:
            return False
        (user,) = node.users
        if user.op == "call_module":
            return is_one_of(_end(self.callee(user), 0), _FOLLOWING)
        if _summand(user, node) is None:
            return _activation_function(user) is not None or _pooling_function(user) is not None
        # The last summand, and only where the other isn't the end of a chain that can take the sum.
        others = [operand for operand in user.all_input_nodes if operand is not node and operand.op == "call_module"]
        return not others or not (is_one_of(self.callee(others[0]), CHAINED) or _comes_after(others[0], node))

    def _reaches_before(self, node: fx.Node, container: nn.Module) -> bool:
        """Whether a chain may begin before a container and end in it."""
        before = node.args[0]
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            return False
        return is_one_of(_end(container, 0), _FOLLOWING) and is_one_of(_end(self.callee(before), -1), CHAINED)

    # A chain grows from its first node: each step looks at the only use of the last one's value.

    def _match(self, node: fx.Node) -> Match | None:
        first = self._layer(node, *FIRST)
        if isinstance(first, nn.Conv2d):
            return self._conv(node, first)
        if isinstance(first, nn.Linear):
            return self._linear(node, first)
        return None if first is None else self._norm(node, first)

    def _conv(self, node: fx.Node, conv: nn.Conv2d) -> Match:
        nodes = [node]
        norm = self._extend(nodes, lambda n: self._layer(n, nn.BatchNorm2d))
        residual, in_place = self._extend(nodes, lambda n: _summand(n, nodes[-1])) or (None, False)
        activation: Any = self._extend(nodes, self._activation)
        pool = self._extend(nodes, self._pooling)
        pools_first = activation is None and pool is not None
        if pools_first:
            activation = self._extend(nodes, self._exchangeable_activation)
        arguments = (node.args[0], residual, in_place, conv, norm, activation, pool, pools_first)
        return Match(nodes, chain.conv_chain, arguments)

    def _norm(self, node: fx.Node, norm: nn.Module) -> Match:
        nodes = [node]
        residual, in_place = self._extend(nodes, lambda n: _summand(n, nodes[-1])) or (None, False)
        activation = self._extend(nodes, self._activation)
        return Match(nodes, chain.norm_chain, (node.args[0], residual, in_place, norm, activation))

    def _linear(self, node: fx.Node, linear: nn.Linear) -> Match | None:
        nodes = [node]
        input = node.args[0]
        activation = self._extend(nodes, self._activation)
        if activation is not None:
            drop = self._extend(nodes, self._dropping)
            return Match(nodes, chain.linear_chain, (input, linear, activation, drop))
        pool = self._extend(nodes, lambda n: self._pooling_of_pieces(n, linear))
        if pool is not None:
            return Match(nodes, chain.maxout_pool_chain, (input, linear, pool))
        split = self._extend(nodes, lambda n: _split(n, input, linear.out_features))
        dim = None if split is None else self._extend(nodes, lambda n: _maximum(n, split))
        if split is None or dim is None or self._extend(nodes, _is_values) is None:
            return None
        return Match(nodes, chain.maxout_chain, (input, linear, split.sizes, dim, split.how))

    def _extend(self, nodes: list[fx.Node], recognise: Callable[[fx.Node], _Found | None]) -> _Found | None:
        """What ``recognise`` finds the only use of the last node to be; that use then belongs to the chain, too."""
        users = list(nodes[-1].users)
        for user in users:
            found = None if user in self._taken else recognise(user)
            if found is None:
                continue
            if len(users) > 1:
                self.stops[self.callee(nodes[0])] = "its output is used more than once"
            elif not self._may_move(nodes, user):
                self.stops[self.callee(nodes[0])] = "something else happens in between"
            else:
                nodes.append(user)
                return found
        return None

    def _may_move(self, nodes: list[fx.Node], last: fx.Node) -> bool:
        """Whether the calls may all be made where the last one is: nothing in between can change what they read."""
        layers = {self.callee(node) for node in nodes if node.op == "call_module"}
        between = self.nodes[self.nodes.index(nodes[0]) : self.nodes.index(last)]
        others = [node for node in between if node not in nodes]
        if not all(self._is_pure(node, layers) for node in others):
            return False
        self.moved.update(str(node.target) for node in others if node.op == "call_module")
        return True

    def _is_pure(self, node: fx.Node, layers: set[nn.Module]) -> bool:
        """Whether a call changes neither its arguments nor one of ``layers``."""
        if node.op == "call_module":
            called = self.callee(node)
            return keeps_to_itself(called) and layers.isdisjoint(called.modules())
        in_place = node.target in IN_PLACE or str(getattr(node.target, "__name__", node.target)).endswith("_")
        return not (in_place or node.kwargs.get("inplace") or "out" in node.kwargs)

    # What a call is: a layer, or the arguments of a function, or None.

    def _layer(self, node: fx.Node, *classes: type[nn.Module]) -> nn.Module | None:
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return None
        layer = self.callee(node)
        if not is_one_of(layer, classes):
            return None
        reason = self.refuses(str(node.target), layer)
        if reason is None:
            return layer
        self.stops[layer] = reason
        return None

    def _activation(self, node: fx.Node) -> nn.Module | str | None:
        return self._layer(node, *ACTIVATIONS) or _activation_function(node)

    def _exchangeable_activation(self, node: fx.Node) -> nn.Module | str | None:
        activation = self._activation(node)
        return activation if activation is not None and activation_of(activation)[0] in _EXCHANGEABLE else None

    def _pooling(self, node: fx.Node) -> nn.Module | tuple[Any, Any, Any] | None:
        layer = self._layer(node, nn.MaxPool2d)
        if layer is None:
            return _pooling_function(node)
        if pooling_of(layer):
            return layer
        self.stops[layer] = "has options that aren't fused"
        return None

    def _pooling_of_pieces(self, node: fx.Node, linear: nn.Linear) -> nn.Module | None:
        layer = self._layer(node, nn.MaxPool1d)
        return layer if layer is not None and pieces_of(layer, linear) else None

    def _dropping(self, node: fx.Node) -> nn.Module | tuple[float, bool] | None:
        layer = self._layer(node, nn.Dropout)
        if layer is not None or node.target is not F.dropout or len(node.args) != 1:
            return layer
        p, training = node.kwargs["p"], node.kwargs["training"]
        return (p, training) if isinstance(p, float | int) and isinstance(training, bool) else None


def is_known(module: nn.Module) -> bool:
    """Whether a module's code is PyTorch's or ours."""
    return type(module).__module__.startswith("torch.nn.") or isinstance(module, Layer)


def begins_a_chain(layer: nn.Module) -> bool:
    """Whether a chain can begin with such a layer."""
    return is_one_of(layer, FIRST)


def is_plain_container(module: nn.Module) -> bool:
    """Whether calling a module is calling its children one after another, and nothing else."""
    return isinstance(module, nn.Sequential) and calls_in_order(stock_of(module)) and is_untouched(module)


def keeps_to_itself(module: nn.Module) -> bool:
    """Whether calling a module changes nothing but the module, wherever it is called."""
    return all(
        (is_known(part) or is_plain_container(part)) and is_untouched(part) and not getattr(part, "inplace", False)
        for part in module.modules()
    )


def _end(module: nn.Module, place: int) -> nn.Module:
    """The first (0) or last (-1) layer that is called in containers, or the module itself."""
    while is_plain_container(module) and len(module._modules):
        module = list(module._modules.values())[place]  # type: ignore[assignment]
    return module


def _comes_after(node: fx.Node, other: fx.Node) -> bool:
    return other < node


# --- Functions --------------------------------------------------------------------------------------------------------

_FUNCTIONS: dict[Any, str] = {
    **{
        getattr(F, name): name for name in ("celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu")
    },
    **{getattr(F, name): name for name in ("logsigmoid", "mish", "relu", "relu6", "selu", "silu", "softsign")},
    **{getattr(torch, name): name.rstrip("_") for name in ("relu", "relu_", "selu", "sigmoid", "tanh")},
}
_METHODS = {name: name.rstrip("_") for name in ("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_")}
#: Activations that never decrease, and whose gradient vanishes where they are constant: pooling may come first.
_EXCHANGEABLE = ("hardtanh", "relu", "relu6")

_POOLING_DEFAULTS: dict[str, Any] = {
    "kernel_size": None,
    "stride": None,
    "padding": 0,
    "dilation": 1,
    "ceil_mode": False,
    "return_indices": False,
}


class _Split(NamedTuple):
    """Features split into two sizes, and how, as of `fusednn.layers.chain.maxout_chain`."""

    sizes: tuple[int, int]
    how: int | str


def _activation_function(node: fx.Node) -> str | None:
    """The name of an activation that is called with its default parameters."""
    if len(node.args) != 1:
        return None
    if node.op == "call_method":
        return None if node.kwargs else _METHODS.get(str(node.target))
    name = _FUNCTIONS.get(node.target) if node.op == "call_function" else None
    options = {option: value for option, value in node.kwargs.items() if option != "inplace"}
    if name == "gelu":
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(options.get("approximate", "none")))
    if name is None or not options:
        return name
    defaults = inspect.signature(getattr(F, name)).parameters
    return name if all(defaults[option].default == value for option, value in options.items()) else None


def _pooling_function(node: fx.Node) -> tuple[Any, Any, Any] | None:
    """Size, stride and padding of a call of a max pooling function without further options."""
    if node.target not in (F.max_pool2d, torch.max_pool2d):
        return None
    options = {**_POOLING_DEFAULTS, **dict(zip(_POOLING_DEFAULTS, node.args[1:], strict=False)), **node.kwargs}
    sizes = [options.pop(name) for name in ("kernel_size", "stride", "padding")]
    numbers = [number for size in sizes for number in (size if isinstance(size, tuple | list) else (size,))]
    plain = all(number is None or type(number) is int for number in numbers)
    if not plain or any(value != _POOLING_DEFAULTS[name] for name, value in options.items()):
        return None
    return sizes[0], sizes[1], sizes[2]


def _summand(node: fx.Node, value: fx.Node) -> tuple[fx.Node, bool] | None:
    """What a call adds to ``value``, and whether in place."""
    in_place = node.target in (operator.iadd, "add_")
    if not (in_place or node.target in (operator.add, torch.add, "add")) or len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    other = right if left is value else left
    if not isinstance(other, fx.Node) or left is right or (in_place and left is not value):
        return None
    return other, in_place


def _split(node: fx.Node, input: Any, features: int) -> _Split | None:
    """How a call splits the features of a linear layer, of which ``input`` is the input."""
    arguments: Any = node.args[1:]
    if node.op != "call_method" or node.kwargs:
        return None
    if node.target == "unflatten" and len(arguments) == 2 and arguments[0] in (1, -1):
        how, sizes = arguments
    elif node.target in ("view", "reshape") and len(arguments) == 3 and arguments[0] == -1:
        how, sizes = "rest", arguments[1:]
    elif node.target in ("view", "reshape") and len(arguments) == 3 and _is_rows(arguments[0], input):
        how, sizes = "rows", arguments[1:]
    else:
        return None
    if len(sizes) != 2 or any(type(size) is not int for size in sizes):
        return None
    first, second = sizes
    if how != "rest" and -1 in sizes:
        first, second = (features // second, second) if first == -1 else (first, features // first)
    return _Split((first, second), how) if first > 0 and first * second == features else None


def _is_rows(size: Any, input: Any) -> bool:
    """Whether a value is the first size of ``input``."""
    if not isinstance(size, fx.Node):
        return False
    if size.op == "call_method":
        return size.target == "size" and size.args == (input, 0)
    shape = size.args[0] if size.target is operator.getitem and size.args[1] == 0 else None
    return isinstance(shape, fx.Node) and shape.target is getattr and shape.args == (input, "shape")


def _maximum(node: fx.Node, split: _Split) -> int | None:
    """The dimension, -1 or -2, along which a call takes the maximum.

    Of ``max`` only, whose gradient goes to one of equal elements; that of ``amax`` is shared among them.
    """
    if node.target not in ("max", torch.max) or len(node.args) + len(node.kwargs) != 2:
        return None
    given: Any = node.args[1] if len(node.args) == 2 else node.kwargs.get("dim")
    dims = {-1: -1, -2: -2} if split.how == -1 else {-1: -1, -2: -2, 2: -1, 1: -2}
    return dims.get(given) if type(given) is int else None


def _is_values(node: fx.Node) -> bool | None:
    """True for the first of a maximum's two results."""
    picks = node.target is operator.getitem and node.args[1] == 0
    return True if picks or (node.target is getattr and node.args[1] == "values") else None
