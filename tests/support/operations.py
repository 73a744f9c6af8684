"""Every function and layer of ours beside PyTorch's, with operands: what checks of all families go through.

The calls of layers, and of functions that ``torch.nn.functional`` lacks, are those of ``python -m fusednn check``; here
are those that it has no need of.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusednn import autograd
from fusednn.autograd.batch_norm_chain import batch_norm_chain
from fusednn.autograd.batch_norm_pool import activation_pool, batch_norm_pool
from fusednn.autograd.bias_activation_dropout import conv_activation_dropout, linear_activation_dropout
from fusednn.autograd.pool import act_pool
from fusednn.commands.self_test import FUNCTIONS, Sample, function_sample, layer_sample
from fusednn.layers.twin import TWINS
from fusednn.testing import leaf, random_tensor

from .device import DEVICE

__all__ = ["ARGUMENTS", "OPERATIONS", "OWN", "OWN_ARGUMENTS", "Operation"]

# --- Functions that ``torch.nn.functional`` has too, by their arguments -----------------------------------------------

_X = random_tensor((2, 4), torch.float32, "cpu")
_P = _X.sigmoid()
_T = random_tensor((2, 4), torch.float32, "cpu", seed=1).sigmoid()
_IMAGES = random_tensor((1, 2, 4, 5), torch.float32, "cpu")
_CLASSES = torch.tensor([1, 3])

_SPECIAL: dict[str, dict[str, Any]] = {
    "batch_norm": {
        "input": _IMAGES,
        **dict(zip(("running_mean", "running_var"), (torch.zeros(2), torch.ones(2)), strict=True)),
        **dict(zip(("weight", "bias"), (torch.ones(2), torch.zeros(2)), strict=True)),
        "training": True,
    },
    "conv1d": {
        "input": _IMAGES[..., 0],
        "weight": random_tensor((3, 2, 2), torch.float32, "cpu"),
        "bias": torch.ones(3),
    },
    "conv2d": {"input": _IMAGES, "weight": random_tensor((3, 2, 2, 2), torch.float32, "cpu"), "bias": torch.ones(3)},
    "conv3d": {"input": _IMAGES[None], "weight": random_tensor((3, 1, 1, 2, 2), torch.float32, "cpu")},
    **{
        f"conv_transpose{n}d": {
            "input": random_tensor((1, 2, *[3] * n), torch.float32, "cpu"),
            "weight": random_tensor((2, 3, *[2] * n), torch.float32, "cpu"),
            "bias": torch.ones(3),
        }
        for n in (1, 2, 3)
    },
    "linear_cross_entropy": {
        "input": _X,
        "linear_weight": random_tensor((5, 4), torch.float32, "cpu"),
        "target": _CLASSES,
    },
    "max_pool1d": {"input": _IMAGES[0], "kernel_size": 2},
    "max_pool2d": {"input": _IMAGES, "kernel_size": 2},
    "max_pool3d": {"input": _IMAGES[None], "kernel_size": 2},
    "prelu": {"input": _X, "weight": torch.tensor([0.3])},
    "rrelu": {"input": _X, "lower": 0.25, "upper": 0.25},
    "threshold": {"input": _X, "threshold": 0.1, "value": -1.0},
    **{key: {"input": _X, "target": _CLASSES} for key in ("cross_entropy", "nll_loss")},
    **{key: {"input": _X, "dim": 1} for key in ("log_softmax", "softmax", "softmin")},
    **{key: {"input": _X, "target": _T} for key in ("kl_div", "binary_cross_entropy_with_logits")},
    **{key: {"input": _X, "target": _T} for key in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")},
    "binary_cross_entropy": {"input": _P, "target": _T},
    # A probability of 1 leaves nothing to chance.
    **{key: {"input": _X, "p": 1.0, "training": True} for key in ("dropout", "alpha_dropout")},
    **{key: {"input": _IMAGES, "p": 1.0, "training": True} for key in ("dropout2d", "feature_alpha_dropout")},
    "dropout1d": {"input": _IMAGES[0], "p": 1.0, "training": True},
    "dropout3d": {"input": _IMAGES, "p": 1.0, "training": True},
}

#: By name, arguments of each function that ``torch.nn.functional`` has too.
ARGUMENTS: dict[str, dict[str, Any]] = {
    name: _SPECIAL.get(name, {"input": _X}) for name in autograd.__all__ if hasattr(F, name)
}

_FILTERS_2D, _THREE = random_tensor((3, 2, 2, 2), torch.float32, "cpu", seed=1), torch.ones(3)
_RESIDUAL = random_tensor((1, 3, 3, 4), torch.float32, "cpu")
_CONVOLUTION = {"input": _IMAGES, "weight": _FILTERS_2D, "bias": _THREE, "residual": _RESIDUAL, "pool_size": 2}
_NORM = {
    **dict(zip(("running_mean", "running_var"), (torch.zeros(3), _THREE), strict=True)),
    **dict.fromkeys(("norm_weight", "norm_bias"), _THREE),
}

#: By name, arguments of each function that ``torch.nn.functional`` lacks.
OWN_ARGUMENTS: dict[str, dict[str, Any]] = {
    "batch_norm_act": {**_SPECIAL["batch_norm"], "residual": _IMAGES.flip(-1)},
    "bias_activation_dropout": {"input": _X, "bias": torch.ones(4), "residual": _T},
    "block_end": {"input": _X, "residual": _T, "scale": torch.arange(1.0, 5.0), "p": 1.0},
    "channel_statistics": {"input": _IMAGES},
    "conv_act_pool2d": _CONVOLUTION,
    "conv_batch_norm_act2d": {**_CONVOLUTION, **_NORM, "training": True},
    "drop_connect_linear": {"input": _X, "weight": random_tensor((3, 4), torch.float32, "cpu"), "bias": _THREE},
    "gated": {"gate": _X, "other": _T, "activation": "gelu"},
    "gated_channels": {"input": _IMAGES, "gate": _IMAGES[:, :, :1, :1].flip(1), "activation": "hardsigmoid"},
    "gated_halves": {"input": _X, "dim": 1, "activation": "silu"},
    "highway": {"gate": _X, "transformed": _T, "carried": _P},
    "maxout": {"input": _X, "pieces": 2},
    "maxout_conv2d": {"input": _IMAGES, "weight": torch.stack((_FILTERS_2D, -_FILTERS_2D)), "bias": torch.ones(2, 3)},
    "maxout_linear": {
        "input": _X,
        "weight": random_tensor((2, 3, 4), torch.float32, "cpu", seed=1),
        "bias": torch.ones(2, 3),
    },
    **{key: {"input": _X} for key in ("quick_gelu", "relu_squared")},
    "squareplus": {"input": _X, "b": 0.5},
    "standout": {"input": _X, "belief": _T},
}

# --- Calls of everything, of which stock operators can say what is right ----------------------------------------------


class Operation:
    """A call with operands in ``dtype`` that ``change`` may lay out otherwise, ours and of stock operators.  Nothing is
    left to chance: stock is given the mask that ours draws.
    """

    def __init__(
        self,
        name: str,
        dtype: torch.dtype = torch.float64,
        device: str = DEVICE,
        change: Callable[[Tensor], Tensor] = lambda operand: operand,
    ) -> None:
        self.name = name
        sample = _SAMPLES[name]()
        self.operands = [change(x.to(device, dtype if x.is_floating_point() else None)) for x in sample.operands]
        self.ours, self.stock = (
            function.to(device, dtype) if isinstance(function, nn.Module) else function
            for function in (sample.ours, sample.stock)
        )
        if sample.draw is not None:
            self.stock = partial(sample.stock, sample.draw(self.ours, *self.operands))

    def call(self, function: Callable[..., Any], operands: Sequence[Tensor]) -> Tensor:
        """What ``function``, ours or stock, makes of operands, which may be others: always the same."""
        torch.manual_seed(0)
        result = function(*operands)
        return result[0] if isinstance(result, tuple) else result

    def leaves(self) -> list[Tensor]:
        return [leaf(operand) for operand in self.operands]


def _layer(stock_class: type[nn.Module]) -> Sample:
    """With a batch of two, so that checks stay cheap."""
    sample = layer_sample(stock_class)
    return sample._replace(operands=tuple(operand[:2] for operand in sample.operands))


def _function(name: str, *operands: Tensor, **options: Any) -> Sample:
    """A function that stock has too, with options, whose tensors are given in the dtype of the first operand."""

    def call(function: Callable[..., Any], x: Tensor, *others: Tensor) -> Any:
        given = {key: value.to(x) if isinstance(value, Tensor) else value for key, value in options.items()}
        return function(x, *others, **given)

    return Sample(partial(call, getattr(autograd, name)), partial(call, getattr(F, name)), operands)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return random_tensor(shape, torch.float64, "cpu", seed)


_LOGITS, _WEIGHTS = _normal(6, 5), torch.tensor([0.5, 1.0, 2.0, 0.0, 1.5])
_TARGETS = torch.tensor([0, 3, 1, 1, 4, 2])
_IMAGE, _FILTERS, _BIAS = _normal(2, 3, 6, 7), _normal(4, 3, 3, 3, seed=1), _normal(4, seed=2)


def _conv_act(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return F.silu(F.conv2d(x, weight, bias) + residual)


def _conv_act_pool(activation: str, size: int | None, stride: int | None, padding: int) -> Sample:
    """With windows that overlap, that don't, or none."""

    def stock(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = getattr(F, activation)(F.conv2d(x, weight, bias))
        return y if size is None else F.max_pool2d(y, size, stride, padding)

    pooling = {"pool_size": size, "pool_stride": stride, "pool_padding": padding}
    return Sample(partial(autograd.conv_act_pool2d, activation=activation, **pooling), stock, (_IMAGE, _FILTERS, _BIAS))


def _conv_norm(x: Tensor, filters: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """In training, pooled."""
    options = {"training": True, "residual": residual, "pool_size": 2}
    return autograd.conv_batch_norm_act2d(x, filters, None, None, None, weight, bias, **options)


def _stock_conv_norm(x: Tensor, filters: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = F.batch_norm(F.conv2d(x, filters), None, None, weight, bias, True)
    return F.max_pool2d(F.relu(y + residual), 2)


def _norm_act(x: Tensor, residual: Tensor, mean: Tensor, weight: Tensor, bias: Tensor, *, function: Any) -> Tensor:
    """In evaluation."""
    mean = mean.detach()
    return function(x, mean, mean.abs() + 1, weight, bias, False, residual=residual, activation="silu")


def _stock_norm_act(*operands: Any, residual: Tensor, activation: str) -> Tensor:
    return getattr(F, activation)(F.batch_norm(*operands) + residual)


_OWN_FUNCTIONS: dict[str, Callable[[], Sample]] = {
    name: partial(function_sample, row) for name, row in FUNCTIONS.items()
}

#: What other options make of a function: another gradient, or another path to it.
_VARIANTS: dict[str, Callable[[], Sample]] = {
    "batch_norm_act in evaluation": lambda: Sample(
        partial(_norm_act, function=autograd.batch_norm_act),
        partial(_norm_act, function=_stock_norm_act),
        (_normal(2, 3, 4, 5), _normal(2, 3, 4, 5, seed=1), *(_normal(3, seed=seed) for seed in (2, 3, 4))),
    ),
    "binary_cross_entropy_with_logits of weights": lambda: _function(
        "binary_cross_entropy_with_logits", _LOGITS, _LOGITS.sigmoid(), pos_weight=_WEIGHTS, reduction="none"
    ),
    **{
        f"conv_act_pool2d of {activation}": partial(_conv_act_pool, activation, *window)
        for activation, window in (("leaky_relu", (3, 1, 1)), ("sigmoid", (2, 2, 0)), ("tanh", (None, None, 0)))
    },
    "conv_act_pool2d without pooling": lambda: Sample(
        lambda x, w, b, residual: autograd.conv_act_pool2d(
            x, w, b, activation="silu", residual=residual, pool_size=None
        ),
        _conv_act,
        (_IMAGE, _FILTERS, _BIAS, _normal(2, 4, 4, 5, seed=3)),
    ),
    "conv_batch_norm_act2d of a residual": lambda: Sample(
        _conv_norm,
        _stock_conv_norm,
        (_IMAGE, _FILTERS, *(_normal(*shape, seed=3) for shape in ((2, 4, 4, 5), (4,), (4,)))),
    ),
    "cross_entropy of some": lambda: _function("cross_entropy", _LOGITS, _TARGETS, ignore_index=1),
    "cross_entropy of weights": lambda: _function(
        "cross_entropy", _LOGITS, _TARGETS, weight=_WEIGHTS, ignore_index=2, label_smoothing=0.2
    ),
    "cross_entropy of probabilities": lambda: _function(
        "cross_entropy", _LOGITS, _LOGITS.flip(0).softmax(1), weight=_WEIGHTS, reduction="sum"
    ),
    "elu of another alpha": lambda: _function("elu", _LOGITS, alpha=0.3),
    "gelu of tanh": lambda: _function("gelu", _LOGITS, approximate="tanh"),
    "kl_div of logarithms": lambda: _function(
        "kl_div", _LOGITS, _LOGITS.flip(0), log_target=True, reduction="batchmean"
    ),
    "max_pool2d of overlapping windows": lambda: _function("max_pool2d", _IMAGE, kernel_size=3, stride=1, padding=1),
    "nll_loss of weights": lambda: _function("nll_loss", _LOGITS, _TARGETS, weight=_WEIGHTS, ignore_index=0),
    "softmax of rows": lambda: _function("softmax", _normal(2, 3, 4), dim=0),
}

# What fused layers alone call.


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    """What a convolution would make, with or without its bias."""
    return x if bias is None else x + bias.view(-1, 1, 1)


def _chain(x: Tensor, bias: Tensor, residual: Tensor, slopes: Tensor, weight: Tensor, norm_bias: Tensor) -> Tensor:
    options = {"residual": residual, "slopes": slopes, "before": "tanh", "shift": bias, "product": partial(_biased, x)}
    return batch_norm_chain(x, None, None, weight, norm_bias, True, 0.1, 1e-5, **options)


def _stock_chain(x: Tensor, bias: Tensor, residual: Tensor, slopes: Tensor, *norm: Tensor) -> Tensor:
    y = F.batch_norm(_biased(x, bias).tanh(), None, None, *norm, True, 0.1, 1e-5)
    return F.prelu(y + residual, slopes)


def _over_places(y: Tensor, maximum: bool) -> Tensor:
    return F.adaptive_max_pool2d(y, 1).flatten(1) if maximum else y.mean((2, 3))


def _norm_pool(x: Tensor, *norm: Tensor, maximum: bool) -> Tensor:
    return batch_norm_pool(x, None, None, *norm, True, 0.1, 1e-5, maximum=maximum, activation="silu")


def _stock_norm_pool(x: Tensor, *norm: Tensor, maximum: bool) -> Tensor:
    return _over_places(F.silu(F.batch_norm(x, None, None, *norm, True, 0.1, 1e-5)), maximum)


_VECTORS = (_normal(3, seed=1), _normal(3, seed=2))
_CHAINS: dict[str, Callable[[], Sample]] = {
    "act_pool of silu": lambda: Sample(
        lambda x: act_pool(2, x, 2, None, 0, "silu"), lambda x: F.max_pool2d(F.silu(x), 2), (_IMAGE,)
    ),
    "batch_norm_chain of everything": lambda: Sample(
        _chain, _stock_chain, (_IMAGE, _normal(3), _IMAGE.flip(0), *_VECTORS, _normal(3, seed=3))
    ),
    "conv_activation_dropout of relu": lambda: Sample(
        lambda x, bias: conv_activation_dropout(partial(_biased, x), bias, 0.0, "relu", (), True, 1),
        lambda x, bias: F.relu(_biased(x, bias)),
        (_IMAGE, _VECTORS[0]),
    ),
    "linear_activation_dropout of gelu": lambda: Sample(
        lambda x, weight, bias: linear_activation_dropout(x, weight, bias, 0.0, "gelu", (), True),
        lambda x, weight, bias: F.gelu(F.linear(x, weight, bias)),
        (_LOGITS, _normal(3, 5, seed=1), _normal(3, seed=2)),
    ),
    **{
        f"activation_pool of {'maxima' if maximum else 'means'}": partial(
            Sample,
            lambda x, bias, maximum=maximum: activation_pool(partial(_biased, x), bias, "tanh", (), maximum=maximum),
            lambda x, bias, maximum=maximum: _over_places(_biased(x, bias).tanh(), maximum),
            (_IMAGE, _VECTORS[0]),
        )
        for maximum in (True, False)
    },
    **{
        f"batch_norm_pool of {'maxima' if maximum else 'means'}": partial(
            Sample,
            partial(_norm_pool, maximum=maximum),
            partial(_stock_norm_pool, maximum=maximum),
            (_IMAGE, *_VECTORS),
        )
        for maximum in (True, False)
    },
}

#: The functions among the operations that stock lacks, and their variants.
OWN = tuple(name for name in (*_VARIANTS, *_CHAINS, *_OWN_FUNCTIONS) if not hasattr(F, name.partition(" ")[0]))

_SAMPLES: dict[str, Callable[[], Sample]] = {
    **{stock_class.__name__: partial(_layer, stock_class) for stock_class in TWINS},
    **_OWN_FUNCTIONS,
    **_VARIANTS,
    **_CHAINS,
}

#: The names of what `Operation` can be made of: every layer that ``torch.nn`` has too, every function that it lacks,
#: some of them with other options, and the functions that fused layers alone call.
OPERATIONS = tuple(_SAMPLES)
