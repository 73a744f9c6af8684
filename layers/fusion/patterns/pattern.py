"""What a pattern is, and what those with a residual share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, fx, nn

from ....autograd.activation import resolve_activation
from ..activations import Activation, activated, activation_of, activation_refusal
from ..members import computed
from ..norms import activation_within

__all__ = [
    "Finder",
    "Match",
    "Pattern",
    "added",
    "are_alike",
    "behind",
    "complete",
    "distinct",
    "finished",
    "passed_on",
]


_Found = TypeVar("_Found")


class Finder(Protocol):
    """What a pattern may ask when it is matched: the part of `fusednn.layers.fusion.search.Search` for it."""

    stops: dict[nn.Module, str]  # why a layer isn't in a chain, or its chain isn't longer

    def callee(self, node: fx.Node) -> nn.Module:
        """The module that a node calls."""

    def layer(self, node: fx.Node, *classes: type[nn.Module]) -> nn.Module | None:
        """The layer that a call is of, if it is of these classes and may be fused."""

    def activation(self, node: fx.Node, *others: type[nn.Module]) -> Activation:
        """The activation that a call is: its layer, also of ``others``, or its function's name and parameters."""

    def identity(self, nodes: list[fx.Node]) -> nn.Module | None:
        """The identity that comes next, if the pattern goes on behind it."""

    def sum(self, nodes: list[fx.Node]) -> tuple[fx.Node | None, bool]:
        """What is added next, if something is, and whether in place."""

    def ends_before(self, nodes: list[fx.Node], reason: str, *classes: type[nn.Module]) -> None:
        """Say why a layer of ``classes``, if the only use of the last value is one, isn't part of the pattern."""

    def extend(self, nodes: list[fx.Node], recognise: Callable[[fx.Node], _Found | None]) -> _Found | None:
        """What ``recognise`` finds the only use of the last node to be; that use then belongs to the pattern, too."""


class Match(NamedTuple):
    """Calls that become one: their nodes, first to last, and the function that is called in their place.

    It takes ``operands``, values of the graph, and by their names ``members``: layers, and constants.

    Where layers are called before the residual is there, the last operand, ``begin`` is called at the place of the
    first ``begun`` nodes, with all but the residual, and with those layers as ``between``: it does what they may not
    come before.  What it returns is called with the residual.
    """

    nodes: list[fx.Node]
    function: Callable[..., Tensor]
    operands: tuple[Any, ...]
    members: dict[str, Any]
    begin: Callable[..., Callable[[Tensor], Tensor]] | None = None
    begun: int = 0


class Pattern(NamedTuple):
    """A kind of neighbours: the classes of its first layer, those of the others, and how it is found.

    ``anywhere``: it may begin with a function, too; its match is asked of each call.
    """

    first: Collection[type[nn.Module]]
    following: tuple[type[nn.Module], ...]
    match: Callable[[Finder, fx.Node, Any], Match | None]
    anywhere: bool = False


def are_alike(residual: Any, shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether a residual has this shape and dtype."""
    return isinstance(residual, Tensor) and residual.shape == shape and residual.dtype is dtype


def distinct(residual: Tensor | None, input: Tensor) -> Tensor | None:
    """The residual as a tensor of its own: torch.compile doesn't trace functions of the same tensor twice."""
    return residual.view_as(residual) if residual is input else residual


def behind(
    search: Finder, nodes: list[fx.Node], norm: nn.Module | None
) -> tuple[nn.Module | None, fx.Node | None, bool, Any]:
    """What comes behind a norm: an identity, a residual, whether that is added in place, and an activation.

    Any may be missing; all are, where the norm has an activation of its own.
    """
    if activation_within(norm) is not None:
        return None, None, False, None
    length = len(nodes)
    identity = None if norm is None else search.identity(nodes)
    residual, in_place = search.sum(nodes)
    activation: Any = search.extend(nodes, search.activation)
    if residual is None and activation is None:
        del nodes[length:]
        identity = None
    return identity, residual, in_place, activation


def passed_on(y: Tensor, identity: nn.Module | None) -> Tensor:
    """What a layer that was an identity makes of y, apart."""
    result: Tensor = y if identity is None else identity(y)
    return result


def complete(begun: Callable[[Tensor], Tensor], residual: Tensor) -> Tensor:
    """The result of a match that began before its residual was there."""
    return begun(residual)


def finished(
    finish: Callable[..., Tensor],
    residual: Tensor,
    norm: nn.Module,
    activation: Activation,
    in_place: bool,
    alike: bool,
) -> Tensor:
    """activation(norm(x) + residual) from what `begin_batch_norm` returned; ``alike``: the sum is of their shape."""
    if alike and activation_refusal(activation) is None:
        resolved = resolve_activation(*activation_of(activation))
        return computed(lambda: finish(residual, resolved), norm, activation)
    return activated(added(finish(None, resolve_activation(None)), residual, in_place), activation)


def added(y: Tensor, residual: Tensor | None, in_place: bool) -> Tensor:
    """y + residual as the code adds it, apart."""
    if residual is None:
        return y
    if in_place:
        y += residual
        return y
    return y + residual
