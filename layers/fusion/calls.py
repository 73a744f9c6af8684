"""Functions in a graph that stand where a layer could: activations, max pooling, reductions, sums."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ...autograd import stock as F
from ...autograd.activation import resolve_activation
from ...autograd.dispatch import is_number

__all__ = [
    "Reduction",
    "activation_function",
    "changes_more",
    "is_squared",
    "is_values",
    "pooling_function",
    "reduction",
    "slopes_function",
    "summand",
]

_FUNCTIONS: dict[Any, str] = {
    **{
        getattr(F, name): name for name in ("celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu")
    },
    **{getattr(F, name): name for name in ("logsigmoid", "mish", "relu", "relu6", "selu", "silu", "softsign")},
    **{getattr(torch, name): name.rstrip("_") for name in ("relu", "relu_", "selu", "sigmoid", "tanh")},
}
_METHODS = {name: name.rstrip("_") for name in ("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_")}

#: Parts of the names of functions that draw random numbers, or change statistics.
_CHANGING = (
    *("attention", "batch_norm", "bernoulli", "dropout", "embedding", "fractional", "gumbel", "instance_norm"),
    *("multinomial", "poisson", "rand", "rrelu"),
)

_POOLINGS = {
    1: (F.max_pool1d, torch.max_pool1d),
    2: (F.max_pool2d, torch.max_pool2d),
    3: (F.max_pool3d, torch.max_pool3d),
}
_POOLING_DEFAULTS: dict[str, Any] = {
    "kernel_size": None,
    "stride": None,
    "padding": 0,
    "dilation": 1,
    "ceil_mode": False,
    "return_indices": False,
}


def activation_function(node: fx.Node) -> tuple[str, tuple[float, ...]] | None:
    """The name of an activation that is called with constants, and these: its parameters in PyTorch's order."""
    if len(node.args) != 1:
        return None
    if node.op == "call_method":
        name = None if node.kwargs else _METHODS.get(str(node.target))
        return None if name is None else (name, ())
    name = _FUNCTIONS.get(node.target) if node.op == "call_function" else None
    if name is None:
        return None
    options = dict(node.kwargs)
    inplace = options.pop("inplace", False)
    if name == "gelu":
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(str(options.pop("approximate", "none")))
    if name is None:
        return None
    row = resolve_activation(name).row
    parameters: Any = tuple(map(options.get, row.parameters, row.defaults))
    if options.keys() - set(row.parameters) or type(inplace) is not bool or not all(map(is_number, parameters)):
        return None
    return None if resolve_activation(name, parameters).refusal(inplace) else (name, parameters)


def slopes_function(node: fx.Node) -> fx.Node | None:
    """The slopes of a call of PReLU's function, where they are the module's: a parameter or a buffer."""
    if node.target not in (F.prelu, "prelu"):
        return None
    slopes = (dict(zip(("input", "weight"), node.args, strict=False)) | node.kwargs).get("weight")
    return slopes if isinstance(slopes, fx.Node) and slopes.op == "get_attr" else None


def is_squared(node: fx.Node) -> bool:
    """Whether the only use of a value is to be squared."""
    (user,) = node.users if len(node.users) == 1 else (node,)
    return user.target in (torch.square, "square") or (
        user.target in (operator.pow, torch.pow, "pow") and user.args[1:] == (2,)
    )


def pooling_function(node: fx.Node, directions: int) -> tuple[Any, Any, Any] | None:
    """Size, stride and padding of a call of a max pooling function without further options."""
    if node.target not in _POOLINGS[directions]:
        return None
    options = {**_POOLING_DEFAULTS, **dict(zip(_POOLING_DEFAULTS, node.args[1:], strict=False)), **node.kwargs}
    sizes = [options.pop(name) for name in ("kernel_size", "stride", "padding")]
    numbers = [number for size in sizes for number in (size if isinstance(size, tuple | list) else (size,))]
    plain = all(number is None or type(number) is int for number in numbers)
    if not plain or any(value != _POOLING_DEFAULTS[name] for name, value in options.items()):
        return None
    return sizes[0], sizes[1], sizes[2]


class Reduction(NamedTuple):
    """A maximum or a mean over dimensions, which stay where it ``keeps`` them; ``picks`` the first of two results."""

    maximum: bool
    dims: tuple[int, ...]
    keeps: bool
    picks: bool = False

    def covers(self, rank: int) -> bool:
        """Whether of a tensor of so many dimensions all but batch and channels are reduced."""
        inside = all(-rank <= dim < rank for dim in self.dims)
        return inside and sorted(dim % rank for dim in self.dims) == list(range(2, rank))

    def of(self, y: Tensor) -> Tensor:
        """As the code computes it, apart."""
        if not self.maximum:
            return torch.mean(y, self.dims, self.keeps)
        maxima: Tensor = y.max(self.dims[0], self.keeps).values if self.picks else _MAXIMA[len(self.dims)](y, 1)
        return maxima


#: Adaptive poolings by the number of directions.
_MAXIMA: dict[int, Any] = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}
_MEANS: dict[int, Any] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
_ADAPTIVE = {
    function: (maximum, directions)
    for maximum, functions in ((True, _MAXIMA), (False, _MEANS))
    for directions, function in functions.items()
}


def reduction(node: fx.Node) -> Reduction | None:
    """The reduction that a call is, of those that are fused: not amax, which shares its gradient among equal ones."""
    adaptive = _ADAPTIVE.get(node.target)
    maximum = node.target in ("max", torch.max)
    if adaptive is None and not maximum and node.target not in ("mean", torch.mean):
        return None
    names = ("input", "output_size") if adaptive is not None else ("input", "dim", "keepdim")
    options = dict(zip(names, node.args, strict=False)) | node.kwargs
    if len(node.args) > len(names) or options.keys() - {*names} or names[1] not in options:
        return None
    if adaptive is not None:
        maximum, directions = adaptive
        one_place = options["output_size"] in (1, (1,) * directions, [1] * directions)
        return Reduction(maximum, tuple(range(-directions, 0)), True) if one_place else None
    dim, keeps = options["dim"], options.get("keepdim", False)
    dims = tuple(dim) if isinstance(dim, tuple | list) and not maximum else (dim,)
    if type(keeps) is not bool or any(type(one) is not int for one in dims):
        return None
    return Reduction(maximum, dims, keeps, picks=maximum)


def is_values(node: fx.Node) -> bool | None:
    """True for the first of a maximum's two results."""
    picks = node.target is operator.getitem and node.args[1] == 0
    return True if picks or (node.target is getattr and node.args[1] == "values") else None


def changes_more(node: fx.Node) -> bool:
    """Whether a function may change what isn't its arguments' alone: statistics, or the random generator."""
    name = str(getattr(node.target, "__name__", node.target))
    return any(part in name for part in _CHANGING) and node.kwargs.get("training") is not False


def summand(node: fx.Node, value: fx.Node) -> tuple[fx.Node, bool] | None:
    """What a call adds to ``value``, and whether in place."""
    in_place = node.target in (operator.iadd, "add_")
    if not (in_place or node.target in (operator.add, torch.add, "add")) or len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    other = right if left is value else left
    if not isinstance(other, fx.Node) or left is right or (in_place and left is not value):
        return None
    return other, in_place
