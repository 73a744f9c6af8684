"""Searching the graph of a module's code for patterns: calls of neighbours that can become one.

A pattern (`fusednn.layers.fusion.patterns`) begins with a layer and grows by the only use of its last value, as long as
nothing in between could change what its calls read.  A container's border is no border.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import fx, nn

from .activations import ACTIVATIONS, SLOPED, Activation
from .calls import (
    activation_function,
    changes_more,
    is_squared,
    pooling_function,
    reduction,
    slopes_function,
    summand,
)
from .members import is_one_of, know
from .norms import IMAGE_NORMS
from .patterns import PATTERNS
from .patterns.pattern import Match
from .steady import STEADY, is_plain_container, is_steady, keeps_to_itself
from .trace import IN_PLACE

__all__ = ["Refusal", "Search", "begins_a_chain"]

#: Why a layer, given its name in the module, must not be fused, or None.
Refusal = Callable[[str, nn.Module], str | None]

_Found = TypeVar("_Found")


def _first() -> tuple[type[nn.Module], ...]:
    """The layers that patterns begin with; registered ones join them."""
    return tuple(dict.fromkeys(cls for pattern in PATTERNS for cls in pattern.first))


def _following() -> tuple[type[nn.Module], ...]:
    """Those that follow; registered ones, too."""
    return tuple({cls for pattern in PATTERNS for cls in pattern.following} | ACTIVATIONS.keys() | IMAGE_NORMS.keys())


def _chained() -> tuple[type[nn.Module], ...]:
    return (*_first(), *_following())


know((*_chained(), *STEADY))


class Search:
    """The chains of a module's graph, and for layers whose chain ends or isn't one, the reason."""

    def __init__(self, module: nn.Module, graph: fx.Graph, refuses: Refusal) -> None:
        self.module = module
        self.refuses = refuses
        self.inlined: list[str] = []  # containers whose calls became those of their children
        # Modules that are called before layers of a chain that they stood behind; those of them that stay steady.
        self.moved: set[str] = set()
        self.steady: set[str] = set()
        self._expand(graph)
        self.nodes = list(graph.nodes)
        self.matches: list[Match] = []
        self.stops: dict[nn.Module, str] = {}
        self._taken: set[fx.Node] = set()
        for node in self.nodes:
            match = None if node in self._taken else self._match(node)
            if match is not None:
                self._taken.update(match.nodes)
                self.matches.append(match)

    def callee(self, node: fx.Node) -> nn.Module:
        """The module that a node calls."""
        return self.module.get_submodule(str(node.target))

    def layers(self, match: Match) -> tuple[str, ...]:
        """The names of a match's layers."""
        return tuple(str(node.target) for node in match.nodes if node.op == "call_module")

    def between(self, match: Match) -> list[str]:
        """The names of the layers that are called between what a match begins with and its residual."""
        if match.begin is None or match.operands[-1] is None:
            return []
        first, last = match.nodes[match.begun - 1], match.nodes[match.begun]
        between = self.nodes[self.nodes.index(first) : self.nodes.index(last)]
        return [str(node.target) for node in between if node.op == "call_module" and node not in match.nodes]

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
        if not is_one_of(_end(container, -1), _chained()) or len(node.users) != 1:
            return False
        (user,) = node.users
        if user.op == "call_module":
            return _follows(_end(self.callee(user), 0))
        if summand(user, node) is None:
            poolings = any(pooling_function(user, directions) for directions in (1, 2, 3))
            functions = (activation_function, reduction, slopes_function)
            return poolings or any(recognise(user) is not None for recognise in functions)
        # The last summand, and only where the other isn't the end of a chain that can take the sum.
        others = [operand for operand in user.all_input_nodes if operand is not node and operand.op == "call_module"]
        return not others or not (is_one_of(self.callee(others[0]), _chained()) or _comes_after(others[0], node))

    def _reaches_before(self, node: fx.Node, container: nn.Module) -> bool:
        """Whether a chain may begin before a container and end in it."""
        before = node.args[0]
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            return False
        return _follows(_end(container, 0)) and is_one_of(_end(self.callee(before), -1), _chained())

    # A pattern grows from its first node: each step looks at the only use of the last one's value.

    def _match(self, node: fx.Node) -> Match | None:
        first = self.layer(node, *_first())
        in_place = self._is_in_place(node)  # then others may look at what it was given, and see its result
        for pattern in PATTERNS:
            begins = not in_place if pattern.anywhere else first is not None and is_one_of(first, pattern.first)
            match = pattern.match(self, node, first) if begins else None
            if match is not None and len(match.nodes) > 1 and self._taken.isdisjoint(match.nodes):
                return match
        return None

    def extend(
        self, nodes: list[fx.Node], recognise: Callable[[fx.Node], _Found | None], *, waits: bool = False
    ) -> _Found | None:
        """What ``recognise`` finds the only use of the last node to be; that use then belongs to the pattern, too.

        ``waits``: the pattern begins before the layers between, which may then change what is theirs.
        """
        users = list(nodes[-1].users)
        for user in users:
            found = None if user in self._taken else recognise(user)
            if found is None:
                continue
            if len(users) > 1:
                self._stop(nodes[0], "its output is used more than once")
            elif not self._may_move(nodes, user, waits):
                self._stop(nodes[0], "something else happens in between")
            else:
                nodes.append(user)
                return found
        return None

    def ends_before(self, nodes: list[fx.Node], reason: str, *classes: type[nn.Module]) -> None:
        """Say why a layer of ``classes``, if the only use of the last value is one, isn't part of the pattern."""
        (user,) = nodes[-1].users if len(nodes[-1].users) == 1 else (None,)
        layer = None if user is None else self.layer(user, *classes)
        if layer is not None:
            self.stops[layer] = reason

    def _stop(self, first: fx.Node, reason: str) -> None:
        if first.op == "call_module":
            self.stops[self.callee(first)] = reason

    def _may_move(self, nodes: list[fx.Node], last: fx.Node, waits: bool) -> bool:
        """Whether the calls may all be made where the last one is: nothing in between can change what they read."""
        layers = {self.callee(node) for node in nodes if node.op == "call_module"}
        between = self.nodes[self.nodes.index(nodes[0]) : self.nodes.index(last)]
        others = [node for node in between if node not in nodes]
        if not all(self._is_pure(node, layers) for node in others):
            return False
        since = () if waits else self.nodes[self.nodes.index(nodes[-1]) + 1 : self.nodes.index(last)]
        steady = [node for node in since if node.op == "call_module"]
        if not all(is_steady(self.callee(node)) for node in steady):
            return False
        self.moved.update(str(node.target) for node in others if node.op == "call_module")
        self.steady.update(str(node.target) for node in steady)
        return True

    def _is_pure(self, node: fx.Node, layers: set[nn.Module]) -> bool:
        """Whether a call changes neither its arguments nor one of ``layers``."""
        if node.op == "call_module":
            called = self.callee(node)
            return keeps_to_itself(called) and layers.isdisjoint(called.modules())
        return not (changes_more(node) or self._is_in_place(node) or "out" in node.kwargs)

    def _is_in_place(self, node: fx.Node) -> bool:
        """Whether a call says that it writes over its first argument."""
        if node.op == "call_module":
            return bool(getattr(self.callee(node), "inplace", False))
        named = node.target in IN_PLACE or str(getattr(node.target, "__name__", node.target)).endswith("_")
        return bool(named or node.kwargs.get("inplace"))

    # What a call is: a layer, or the arguments of a function, or None.

    def layer(self, node: fx.Node, *classes: type[nn.Module]) -> nn.Module | None:
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

    def activation(self, node: fx.Node, *others: type[nn.Module]) -> Activation:
        """The activation that a call is: its layer, also of ``others``, or its function's name and parameters.

        Of a function whose layer is one of ``others`` it is the slopes.  None also for part of a longer formula.
        """
        if is_squared(node):
            return None
        found = self.layer(node, *ACTIVATIONS, *others) or activation_function(node)
        return found or (slopes_function(node) if set(SLOPED) <= {*others} else None)

    def identity(self, nodes: list[fx.Node]) -> nn.Module | None:
        """The identity that comes next, where one stands for dropout or a path that isn't there."""
        return self.extend(nodes, lambda node: self.layer(node, nn.Identity))

    def sum(self, nodes: list[fx.Node]) -> tuple[fx.Node | None, bool]:
        """What is added next, if something is, and whether in place."""
        return self.extend(nodes, lambda node: summand(node, nodes[-1]), waits=True) or (None, False)


def begins_a_chain(layer: nn.Module) -> bool:
    """Whether a chain can begin with such a layer."""
    return is_one_of(layer, _first())


def _follows(layer: nn.Module) -> bool:
    """Whether such a layer can be in a chain, behind its first."""
    return is_one_of(layer, _following())


def _end(module: nn.Module, place: int) -> nn.Module:
    """The first (0) or last (-1) layer that is called in containers, or the module itself."""
    while is_plain_container(module) and len(module._modules):
        module = list(module._modules.values())[place]  # type: ignore[assignment]
    return module


def _comes_after(node: fx.Node, other: fx.Node) -> bool:
    return other < node
