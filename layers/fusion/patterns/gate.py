"""activation(gate) * other, where the two are tensors, or the halves of one: ``x, gate = y.chunk(2, dim=-1)``.

Where the gate has one element for each channel of ``other``, as in a squeeze-and-excitation block, these are scaled.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from ....autograd.gated import CHANNEL_GATES, GATES, gated, gated_channels, gated_halves
from ..activations import ACTIVATIONS, Activation, activated, activation_of, first_refusal
from ..members import apart, computed
from .highway import is_highway, is_of_highway
from .pattern import Finder, Match, Pattern

__all__ = ["PATTERN", "is_gate"]


def _match(search: Finder, node: fx.Node, _: nn.Module | None) -> Match | None:
    activation = search.activation(node) if _is_multiplied(node) else None
    if activation is None or not _is_a_gates(activation):
        return None
    nodes = [node]
    other = search.extend(nodes, lambda n: _gated_by(n, nodes[-1]))
    if other is None:
        return None
    gate: Any = node.args[0]
    members: dict[str, Any] = {"activation": activation, "gate_first": nodes[-1].args[0] is node}
    halves = _halves(gate, other)
    if halves is not None:
        input, dim = halves
        members |= {"dim": dim, "first_half": gate.args[1] == 0}
        return Match(nodes, _compute_halves, (input, gate, other), members)
    return Match(nodes, _compute, (gate, other), members)


PATTERN = Pattern(ACTIVATIONS, (), _match, anywhere=True)


def is_gate(node: fx.Node, activation: Activation) -> bool:
    """Whether the only use of an activation's value is to gate another, or two as of a highway."""
    if node.kwargs.get("inplace") or getattr(activation, "inplace", False):
        return False
    return is_highway(node, activation) or (_is_multiplied(node) and _is_a_gates(activation))


def _is_a_gates(activation: Activation) -> bool:
    return activation_of(activation)[0] in (*GATES, *CHANNEL_GATES)


def _is_multiplied(node: fx.Node) -> bool:
    (user,) = node.users if len(node.users) == 1 else (node,)
    return _gated_by(user, node) is not None and not is_of_highway(user)


def _gated_by(node: fx.Node, value: fx.Node) -> fx.Node | None:
    """What a call multiplies ``value`` by, if it does that and no more."""
    if node.target not in (operator.mul, torch.mul, "mul") or len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    other = right if left is value else left
    return other if isinstance(other, fx.Node) and left is not right else None


def _halves(gate: Any, other: fx.Node) -> tuple[fx.Node, int] | None:
    """The tensor of which both are halves, and along which dimension."""
    picks = [one.args for one in (gate, other) if isinstance(one, fx.Node) and one.target is operator.getitem]
    if len(picks) != 2 or picks[0][0] is not picks[1][0] or {picks[0][1], picks[1][1]} != {0, 1}:
        return None
    chunk: Any = picks[0][0]
    if chunk.target not in ("chunk", torch.chunk) or not chunk.args:
        return None
    input, *rest = chunk.args
    options = {**dict(zip(("chunks", "dim"), rest, strict=False)), **chunk.kwargs}
    dim = options.get("dim", 0)
    return (input, dim) if options.get("chunks") == 2 and type(dim) is int else None


def _compute(gate: Tensor, other: Tensor, *, activation: Activation, gate_first: bool) -> Tensor:
    """``gate_first``: the code has the gate on the left."""
    if apart(_refusal(gate, other, activation), activation):
        return _apart(gate, other, activation, gate_first)
    name, _ = activation_of(activation)
    assert name is not None
    if gate.shape != other.shape:
        return computed(lambda: gated_channels(other, gate, name), activation)
    return computed(lambda: gated(gate, other, name), activation)


def _compute_halves(
    input: Tensor,
    gate: Tensor,
    other: Tensor,
    *,
    activation: Activation,
    gate_first: bool,
    dim: int,
    first_half: bool,
) -> Tensor:
    """``first_half``: the gate is that of ``input``."""
    if apart(_refusal(gate, other, activation), activation):
        return _apart(gate, other, activation, gate_first)
    name, _ = activation_of(activation)
    assert name is not None
    return computed(lambda: gated_halves(input, dim, name, gate_first=first_half), activation)


def _apart(gate: Tensor, other: Tensor, activation: Activation, gate_first: bool) -> Tensor:
    y = activated(gate, activation)
    return y * other if gate_first else other * y


def _refusal(gate: Tensor, other: Tensor, activation: Activation) -> str | None:
    """Why the activation and the product are computed one by one, or None."""
    refusal = first_refusal(gate, activation)
    if refusal is not None:
        return refusal
    if not isinstance(other, Tensor) or gate.dtype is not other.dtype:
        return "what is gated is unlike the gate"
    name, _ = activation_of(activation)
    if gate.shape == other.shape:
        return None if name in GATES else "no kernel gates with the activation"
    if gate.dim() < 3 or gate.shape != (*other.shape[:2], *(1 for _ in other.shape[2:])):
        return "what is gated is unlike the gate"
    return None if name in CHANNEL_GATES else "no kernel gates channels with the activation"
