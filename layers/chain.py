"""Neighbouring layers computed in one: what replaces their calls, one after another, in the code of a fused module.

A chain takes the layers themselves and reads their parameters, options and modes at each call.  It computes them in one
where kernels take the input, and nobody listens in between; otherwise it calls them one by one, as the code did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module

from ..autograd import stock as F
from ..autograd.activation import resolve_activation
from ..autograd.batch_norm import apply_activation
from ..autograd.bias_activation_dropout import linear_activation_dropout
from ..autograd.conv import conv_act_pool2d, conv_size
from ..autograd.dispatch import autocast_dtype, is_number, tensor_refusal
from ..autograd.maxout import maxout_linear
from . import activation as _activation  # noqa: F401 (for its twins)
from . import batch_norm, conv_batch_norm, sync_batch_norm
from . import dropout as _dropout  # noqa: F401 (for its twins)
from . import pool as _pool  # noqa: F401 (for its twins)
from .conv import padded
from .twin import TWINS, is_untouched

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "activation_of",
    "conv_chain",
    "is_one_of",
    "linear_chain",
    "maxout_chain",
    "maxout_pool_chain",
    "norm_chain",
    "observe_chains",
    "pieces_of",
    "pooling_of",
]

#: The name of each activation layer that can be fused, and its parameters in PyTorch's order.
ACTIVATIONS: dict[type[nn.Module], Callable[[Any], tuple[str, tuple[float, ...]]]] = {
    nn.CELU: lambda layer: ("celu", (layer.alpha,)),
    nn.ELU: lambda layer: ("elu", (layer.alpha,)),
    nn.GELU: lambda layer: ("gelu_tanh" if layer.approximate == "tanh" else "gelu", ()),
    nn.Hardsigmoid: lambda layer: ("hardsigmoid", ()),
    nn.Hardswish: lambda layer: ("hardswish", ()),
    nn.Hardtanh: lambda layer: ("hardtanh", (layer.min_val, layer.max_val)),
    nn.LeakyReLU: lambda layer: ("leaky_relu", (layer.negative_slope,)),
    nn.LogSigmoid: lambda layer: ("logsigmoid", ()),
    nn.Mish: lambda layer: ("mish", ()),
    nn.ReLU: lambda layer: ("relu", ()),
    nn.ReLU6: lambda layer: ("relu6", ()),
    nn.SELU: lambda layer: ("selu", ()),
    nn.SiLU: lambda layer: ("silu", ()),
    nn.Sigmoid: lambda layer: ("sigmoid", ()),
    nn.Softsign: lambda layer: ("softsign", ()),
    nn.Tanh: lambda layer: ("tanh", ()),
}
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
#: The ``torch.nn`` class of each class whose layers chains are made of, and the code of each when it was imported.
_STOCK: dict[type[nn.Module], type[nn.Module]] = {
    cls: stock
    for stock in (nn.Conv2d, nn.Linear, nn.Dropout, nn.MaxPool1d, nn.MaxPool2d, *NORMS, *ACTIVATIONS)
    for cls in (stock, TWINS.get(stock, stock))
}
_FORWARD = {cls: cls.forward for cls in _STOCK}

#: What stands for a layer where the code calls a function: an activation's name, the arguments of a pooling or dropout.
Activation = nn.Module | str | None
Pooling = nn.Module | tuple[Any, Any, Any] | None
Dropping = nn.Module | tuple[float, bool] | None

_observers: list[Callable[[Sequence[nn.Module]], None]] = []


@contextmanager
def observe_chains(observer: Callable[[Sequence[nn.Module]], None]) -> Iterator[None]:
    """Call ``observer`` with the layers of each chain that is about to be computed in one, and with () after it."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


# --- Layers -----------------------------------------------------------------------------------------------------------


#: Hooks of all modules at once, which hear of each layer: of those that it takes to be computed apart.
_GLOBAL_HOOKS: tuple[dict[int, Any], ...] = (
    *(module._global_forward_hooks, module._global_forward_pre_hooks),
    *(module._global_backward_hooks, module._global_backward_pre_hooks),
)
_CALL = nn.Module.__call__
#: Whoever looks on by a hook of all modules, and takes neighbours that are computed in one for what they are.
LOOKS_ON = "_fusednn_looks_on"


def are_heard() -> bool:
    """Whether something hears of the calls of all modules."""
    if nn.Module.__call__ is not _CALL:
        return True
    return any(not hasattr(hook, LOOKS_ON) for hooks in _GLOBAL_HOOKS for hook in hooks.values())


def is_one_of(layer: nn.Module, classes: Iterable[type[nn.Module]]) -> bool:
    """Whether a layer is exactly of one of these ``torch.nn`` classes, or its twin, with the code that these had."""
    cls = type(layer)
    stock = _STOCK.get(cls)
    return stock is not None and stock in classes and cls.forward is _FORWARD[cls]


def activation_of(activation: Activation) -> tuple[str | None, tuple[float, ...]]:
    """An activation's name in the table, and its parameters; None and none where there is no activation."""
    if activation is None or isinstance(activation, str):
        return activation, ()
    return ACTIVATIONS[_STOCK[type(activation)]](activation)


def pooling_of(pool: Any) -> tuple[Any, Any, Any] | None:
    """Size, stride and padding of a max pooling layer, or None where it has options that can't be fused."""
    if isinstance(pool, tuple):
        return pool
    if (
        not is_one_of(pool, (nn.MaxPool2d,))
        or pool.return_indices
        or pool.ceil_mode
        or pool.dilation not in (1, (1, 1))
    ):
        return None
    return pool.kernel_size, pool.stride, pool.padding


def _may_fuse(input: Tensor) -> bool:
    """Whether kernels take the input of a chain, and nobody hears of every layer's call."""
    return tensor_refusal(input) is None and not are_heard()


def _is_ready(layer: Any, *classes: type[nn.Module]) -> bool:
    """Whether a layer, where it is one, still is one of these classes, and may be computed with others."""
    return not isinstance(layer, nn.Module) or (is_one_of(layer, classes) and is_untouched(layer))


def _is_ready_activation(activation: Activation) -> bool:
    """As of `_is_ready`; its parameters may have been changed to what only stock takes."""
    return _is_ready(activation, *ACTIVATIONS) and all(map(is_number, activation_of(activation)[1]))


def _computed(function: Callable[[], Tensor], *layers: Any) -> Tensor:
    """The result of a chain, which its observers are told of."""
    if not _observers:
        return function()
    members = [layer for layer in layers if isinstance(layer, nn.Module)]
    for observer in _observers:
        observer(members)
    try:
        return function()
    finally:
        for observer in _observers:
            observer(())


# --- Chains -----------------------------------------------------------------------------------------------------------


def conv_chain(
    input: Tensor,
    residual: Tensor | None,
    in_place: bool,
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d | None,
    activation: Activation,
    pool: Pooling,
    pools_first: bool = False,
) -> Tensor:
    """max_pool(activation(norm(conv(x)) + residual)), of which all but the convolution may be missing.

    ``in_place``: the code adds the residual in place.  ``pools_first``: it pools before it activates.
    """
    window = (None, None, 0) if pool is None else pooling_of(pool)
    fused = (
        _may_fuse(input)
        and (input.dim() == 4 or (input.dim() == 3 and norm is None))
        and _is_ready(conv, nn.Conv2d)
        and _is_ready(norm, nn.BatchNorm2d)
        and _is_ready_activation(activation)
        and _is_ready(pool, nn.MaxPool2d)
        and window is not None
        and (residual is None or _fits(residual, input, conv))
    )
    if not fused:
        y = conv(input)
        y = y if norm is None else norm(y)
        y = _added(y, residual, in_place)
        if pools_first:
            return _activated(_pooled(y, pool), activation)
        return _pooled(_activated(y, activation), pool)

    def compute() -> Tensor:
        assert window is not None
        name, parameters = activation_of(activation)
        sizes: Any = dict(zip(("pool_size", "pool_stride", "pool_padding"), window, strict=True))
        other = _distinct(residual, input)
        if norm is not None:
            return conv_batch_norm.forward(conv, norm, input, other, name, parameters, **sizes)
        x, padding = padded(conv, input)
        geometry: Any = (conv.stride, padding, conv.dilation, conv.groups)
        options: dict[str, Any] = {"activation": name, "activation_parameters": parameters, **sizes}
        return conv_act_pool2d(x, conv.weight, conv.bias, *geometry, residual=other, **options)

    return _computed(compute, conv, norm, activation, pool)


def norm_chain(input: Tensor, residual: Tensor | None, in_place: bool, norm: Any, activation: Activation) -> Tensor:
    """activation(norm(x) + residual), of which all but the norm may be missing.  ``in_place`` as of `conv_chain`."""
    fused = (
        _may_fuse(input)
        and _is_ready(norm, *NORMS)
        and _is_ready_activation(activation)
        and (residual is None or _are_alike(residual, input.shape, input.dtype))
    )
    if not fused:
        return _activated(_added(norm(input), residual, in_place), activation)
    forward = sync_batch_norm.forward if isinstance(norm, nn.SyncBatchNorm) else batch_norm.forward
    name, parameters = activation_of(activation)
    return _computed(lambda: forward(norm, input, _distinct(residual, input), name, parameters), norm, activation)


def linear_chain(input: Tensor, linear: nn.Linear, activation: Activation, drop: Dropping) -> Tensor:
    """dropout(activation(linear(x))), of which the dropout may be missing."""
    fused = (
        _may_fuse(input)
        and _is_ready(linear, nn.Linear)
        and (linear.bias is None or linear.bias.dtype is linear.weight.dtype)
        and _is_ready_activation(activation)
        and _is_ready(drop, nn.Dropout)
    )
    if not fused:
        y = _activated(linear(input), activation)
        if isinstance(drop, tuple):
            return F.dropout(y, *drop)
        dropped: Tensor = y if drop is None else drop(y)
        return dropped
    name, parameters = activation_of(activation)
    assert name is not None
    if isinstance(drop, nn.Module):
        drop = (drop.p, drop.training)  # type: ignore[assignment]
    p, training = drop or (0.0, False)  # type: ignore[misc]

    def compute() -> Tensor:
        return linear_activation_dropout(input, linear.weight, linear.bias, p, name, parameters, training)

    return _computed(compute, linear, activation, drop)


def maxout_chain(input: Tensor, linear: nn.Linear, sizes: tuple[int, int], dim: int, split: int | str | None) -> Tensor:
    """The maxima along ``dim`` (-1 or -2) of linear(x), whose features are split into ``sizes``.

    ``split`` is the dimension that the code unflattens, or for ``view`` its first size: "rest" (-1) or "rows".
    """
    fused = (
        _may_fuse(input)
        and (split == -1 or input.dim() == 2)
        and _is_ready(linear, nn.Linear)
        and linear.out_features == sizes[0] * sizes[1]
    )
    if fused:
        return _computed(lambda: _maxima(input, linear, sizes, dim), linear)
    y = linear(input)
    if isinstance(split, int):
        y = y.unflatten(split, sizes)
    else:
        y = y.view(-1 if split == "rest" else input.shape[0], *sizes)
    maxima: Tensor = y.max(dim).values
    return maxima


def maxout_pool_chain(input: Tensor, linear: nn.Linear, pool: nn.MaxPool1d) -> Tensor:
    """max_pool(linear(x)) along the features."""
    fused = (
        _may_fuse(input) and input.dim() in (2, 3) and _is_ready(linear, nn.Linear) and _is_ready(pool, nn.MaxPool1d)
    )
    pieces = pieces_of(pool, linear) if fused else None
    if pieces is None:
        maxima: Tensor = pool(linear(input))
        return maxima
    return _computed(lambda: _maxima(input, linear, (linear.out_features // pieces, pieces), -1), linear, pool)


def pieces_of(pool: Any, linear: nn.Linear) -> int | None:
    """How many features of a linear layer the windows of a pooling hold that share none, or None."""
    sizes = [value[0] if isinstance(value, tuple) else value for value in (pool.kernel_size, pool.stride)]
    options = (pool.padding in (0, (0,)), pool.dilation in (1, (1,)), not pool.ceil_mode, not pool.return_indices)
    fits = all(options) and sizes[0] == sizes[1] and linear.out_features % sizes[0] == 0
    return sizes[0] if fits else None


def _maxima(input: Tensor, linear: nn.Linear, sizes: tuple[int, int], dim: int) -> Tensor:
    weight = linear.weight.unflatten(0, sizes)
    bias = None if linear.bias is None else linear.bias.unflatten(0, sizes)
    if dim == -1:  # the pieces come last
        weight, bias = weight.transpose(0, 1), None if bias is None else bias.t()
    return maxout_linear(input, weight, bias)


def _fits(residual: Tensor, input: Tensor, conv: nn.Conv2d) -> bool:
    """Whether a residual has the shape and dtype of the convolution's result, so that their sum has too."""
    if isinstance(conv.padding, str):
        return False
    size = conv_size(input.shape, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    dtype = None if input.dtype is torch.float64 else autocast_dtype(input)
    return _are_alike(residual, (*input.shape[:-3], conv.out_channels, *size), dtype or input.dtype)


def _are_alike(residual: Any, shape: Sequence[int], dtype: torch.dtype) -> bool:
    return isinstance(residual, Tensor) and residual.shape == shape and residual.dtype is dtype


def _distinct(residual: Tensor | None, input: Tensor) -> Tensor | None:
    """The residual as a tensor of its own: torch.compile doesn't trace functions of the same tensor twice."""
    return residual.view_as(residual) if residual is input else residual


def _added(y: Tensor, residual: Tensor | None, in_place: bool) -> Tensor:
    if residual is None:
        return y
    if in_place:
        y += residual
        return y
    return y + residual


def _activated(y: Tensor, activation: Activation) -> Tensor:
    if isinstance(activation, nn.Module):
        result: Tensor = activation(y)
        return result
    return apply_activation(y, None, resolve_activation(activation))


def _pooled(y: Tensor, pool: Pooling) -> Tensor:
    if isinstance(pool, nn.Module):
        result: Tensor = pool(y)
        return result
    return y if pool is None else F.max_pool2d(y, *pool)
