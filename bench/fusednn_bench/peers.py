"""Other libraries' implementations, where they are installed: Liger-Kernel, quack, FlagGems.  Apex is in `steps`.

Each function takes the stock function's operands.  Names and signatures are those of Liger-Kernel 0.8, quack 0.6 and
FlagGems 5.0; one that has gone in another version doesn't take part.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

__all__ = ["activation_peers", "cross_entropy_peers", "installed", "linear_cross_entropy_peers", "softmax_peers"]

Peers = dict[str, Callable[..., Tensor]]


def installed(module: str) -> bool:
    """Whether a module can be found.  Another package of the same name, without that module, isn't it."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def softmax_peers() -> Peers:
    """Over the last dimension of a matrix."""
    found = _flag_gems("softmax", lambda ops, x: ops.softmax(x, 1), _gems_softmax_gradient)
    return {**_liger("liger_softmax"), **_attribute("quack", "quack", "softmax"), **found}


def cross_entropy_peers() -> Peers:
    """Mean losses in the type of the logits, as PyTorch's: quack's is float32, and converted.

    Liger's works on a copy of the logits, since it writes their gradient over them; the copy's time counts.
    """
    liger = {
        name: lambda x, target, function=function: function(x.clone(), target)
        for name, function in _liger("liger_cross_entropy").items()
    }
    quack = {
        name: lambda x, target, function=function: function(x, target).to(x.dtype)
        for name, function in _attribute("quack", "quack", "cross_entropy").items()
    }
    return {**liger, **quack, **_attribute("flag_gems", "flag_gems.fused", "cross_entropy_loss")}


def linear_cross_entropy_peers() -> Peers:
    return _liger("liger_fused_linear_cross_entropy")


def activation_peers(name: str) -> Peers:
    """FlagGems' kernels for both directions, of those activations that need no arguments."""
    if name not in _GEMS_ACTIVATIONS:
        return {}
    saves_output = _GEMS_ACTIVATIONS[name]

    def gradient(ops: Any, g: Tensor, x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = getattr(ops, f"{name}_backward")(g, y if saves_output else x)
        return result

    return _flag_gems(name, lambda ops, x: getattr(ops, name)(x), gradient)


#: Whether the gradient is computed from the output.
_GEMS_ACTIVATIONS = {"gelu": False, "silu": False, "tanh": True, "sigmoid": True}


def _gems_softmax_gradient(ops: Any, g: Tensor, x: Tensor, y: Tensor) -> Tensor:
    result: Tensor = ops.softmax_backward(g, y, 1, x.dtype)
    return result


def _liger(name: str) -> Peers:
    return _attribute("liger", "liger_kernel.transformers.functional", name)


def _attribute(library: str, module: str, name: str) -> Peers:
    if not installed(module):
        return {}
    function = getattr(import_module(module), name, None)
    return {} if function is None else {library: function}


def _flag_gems(
    name: str, value: Callable[[Any, Tensor], Tensor], gradient: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
) -> Peers:
    """FlagGems' kernels of one input, as an operation of autograd: the library itself replaces ATen's operators."""
    if not installed("flag_gems.ops"):
        return {}
    ops = import_module("flag_gems.ops")
    if not all(hasattr(ops, function) for function in (name, f"{name}_backward")):
        return {}

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            y = value(ops, x)
            ctx.save_for_backward(x, y)
            return y

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return gradient(ops, gradients[0], *ctx.saved_tensors)

    return {"flag_gems": Function.apply}
