"""What there is to know of each operation, once: documents, checks, benchmarks and tests read it here.

A row is a function of `fusednn.autograd` and the layers whose operation it is: a call with operands, ours and in
PyTorch's operators; what is kept for the backward pass; and the bytes that each direction moves, its budget.  How an
operation runs is none of the catalogue's business.  ``docs/adding-an-operator.md`` has the steps to a new row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from . import autograd, layers
from .autograd import stock as F
from .autograd.activation import STOCK
from .kernels.functions.activation import ACTIVATIONS, OVERWRITING, Activation

__all__ = ["ROWS", "Row", "normal", "row_of", "row_of_layer"]

#: What a layer has itself, of the operands of its function.
_PARAMETERS = ("weight", "bias", "linear_weight", "running_mean", "running_var")

_Maker = Callable[[Tensor], Tensor]


def normal(*shape: int) -> Tensor:
    """Reproducible, on both sides of every activation's knees."""
    generator = torch.Generator().manual_seed(sum(shape))
    return 3 * torch.randn(shape, generator=generator, dtype=torch.float64)


def _x(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Row:
    """A function of `fusednn.autograd` by its name, the layers whose operation it is, and the facts that they share.

    ``forward`` and ``backward`` are bytes an element, in which e is an element's size: ``"2e + 1/8"`` is two tensors
    and a bit.  Alternatives are apart by semicolons; what isn't a multiple of the elements is in words.

    ``makers`` make the operands by their names, of normal numbers, usually of this ``shape``; ``options`` are the other
    arguments.  ``in_stock`` computes the same of the same in PyTorch's operators, where those have no function of this
    name.  Where the call is random, it drops half, ``drawn(ours, *operands)`` tells which elements are kept, and
    ``in_stock`` is given that mask first.  ``layer_arguments`` are those of the layers' constructors.
    """

    name: str
    layers: tuple[str, ...]
    keeps: str
    forward: str
    backward: str
    makers: Mapping[str, _Maker] = field(default_factory=lambda: {"input": _x})
    shape: tuple[int, ...] = (4, 6, 100)  # more elements than a program's tile holds, and no multiple of it
    options: Mapping[str, Any] = field(default_factory=dict)
    in_stock: Callable[..., Any] | None = None
    drawn: Callable[..., Tensor] | None = None
    layer_arguments: tuple[Any, ...] = ()

    @property
    def family(self) -> str:
        """The name of the files that have it."""
        module: str = getattr(autograd, self.name).__module__
        return module.rpartition(".")[2]

    def operands(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(make(x) for make in self.makers.values())

    def ours(self, *operands: Tensor) -> Any:
        return getattr(autograd, self.name)(**self._arguments(operands))

    def stock(self, *operands: Tensor) -> Any:
        """After the mask, where the call is random."""
        return self.in_stock(*operands) if self.in_stock else getattr(F, self.name)(**self._arguments(operands))

    def _arguments(self, operands: tuple[Tensor, ...]) -> dict[str, Any]:
        return {**dict(zip(self.makers, operands, strict=False)), **self.options}

    def layer_operands(self, layer: str) -> tuple[Tensor, ...]:
        """The operands that a layer is given, with as many dimensions as its name says; others it has itself."""
        sizes = {"2d": (10, 10), "3d": (4, 5, 5)}.get(layer[-2:], self.shape[2:])
        x = normal(*self.shape[:2], *sizes)
        return tuple(make(x) for name, make in self.makers.items() if name not in _PARAMETERS)

    def budget(self, shape: torch.Size, dtype: torch.dtype, alternative: int = 0) -> tuple[float, float]:
        """The bytes that (forward, backward) move for so many elements.  Raises ValueError where they are in words."""
        ahead, back = (
            _bytes_an_element(words.split("; ")[alternative], dtype) for words in (self.forward, self.backward)
        )
        return shape.numel() * ahead, shape.numel() * back


def _bytes_an_element(words: str, dtype: torch.dtype) -> float:
    """What ``"2e + 1/8"`` is for a dtype; what it holds for may stand behind it, in brackets."""
    terms = words.partition(" (")[0].split(" + ")
    return float(
        sum(Fraction(term.removesuffix("e") or 1) * (dtype.itemsize if term.endswith("e") else 1) for term in terms)
    )


# --- Operands and stock operators -------------------------------------------------------------------------------------


def _of(*shape: int) -> _Maker:
    """Normal numbers of another shape, in which negative sizes are those of x: -2 is its size 1."""
    return lambda x: normal(*(size if size > 0 else x.shape[-size - 1] for size in shape)).to(x)


_channels = _of(-2)


def _flipped(x: Tensor) -> Tensor:
    return x.flip(0)


def _positive(x: Tensor) -> Tensor:
    return _channels(x).abs() + 1


def _transposed(x: Tensor) -> Tensor:
    """Other numbers, in another memory layout."""
    return x.flip(0).t().contiguous().t()


def _probabilities(x: Tensor) -> Tensor:
    """Away from where logarithms overflow in 16 bits."""
    return x.sigmoid().clamp(0.02, 0.98)


def _log_probabilities(x: Tensor) -> Tensor:
    return x.log_softmax(1)


def _classes(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device) % x.shape[1]


def _statistics(x: Tensor) -> tuple[Tensor, ...]:
    x = x.detach() if x.dtype == torch.float64 else x.detach().float()
    others = [dim for dim in range(x.dim()) if dim != 1]
    return x.mean(others), x.var(others, correction=0)


def _batch_norm_act(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return F.relu(F.batch_norm(x, None, None, weight, bias, training=True) + residual)


def _conv_batch_norm_act(x: Tensor, weight: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(F.batch_norm(F.conv2d(x, weight), None, None, training=True)), 2)


def _maxima(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The maximum over pieces, each ``product`` with its own weight and bias."""
    return lambda x, weight, bias: torch.stack([product(x, *own) for own in zip(weight, bias, strict=True)]).amax(0)


def _kept_of_ones(ours: Callable[..., Tensor], x: Tensor, *others: Tensor) -> Tensor:
    return ours(torch.ones_like(x), *others) != 0


# --- Rows -------------------------------------------------------------------------------------------------------------

#: Options of the activations that need some.
_ACTIVATION_OPTIONS = {"threshold": (0.1, -1.0)}


def _activation(row: Activation) -> Row:
    """The kernels' table knows the most."""
    keeps = _kept(row)
    if row.overwriting is not None:
        keeps += f" ({_kept(OVERWRITING[row.overwriting])} in place)"
    given = _ACTIVATION_OPTIONS.get(row.name, ())
    return Row(
        row.name,
        tuple(name for name in layers.__all__ if name.lower() == row.name.replace("_", "")),
        keeps,
        *(("2e + 1/8", "2e + 1/8") if row.saves == "mask" else ("2e", "3e")),
        options=dict(zip(row.parameters, given, strict=False)),
        in_stock=None if hasattr(F, row.name) else lambda x: STOCK[row.name](x, *row.defaults),
        layer_arguments=given,
    )


def _kept(row: Activation) -> str:
    return "1 bit an element" if row.saves == "mask" else f"the {row.saves}"


def _loss(name: str, layer: str, input: _Maker = _x, target: _Maker = _transposed) -> Row:
    return Row(name, (layer,), "the operands", "2e (mean); 3e", "3e; 4e", {"input": input, "target": target}, (40, 50))


def _softmax(name: str, layer: str, *dim: int) -> Row:
    return Row(name, (layer,), "the output", "2e", "3e", options={"dim": 1}, layer_arguments=dim)


def _dropout(name: str, layer: str, *sizes: int) -> Row:
    return Row(name, (layer,), "a seed", "2e", "2e", shape=(4, 6, *sizes), options={"training": True})


_WITH_RESIDUAL = ("the input; with a residual 1 bit an element", "3e; 4e + 1/8", "5e; 6e + 1/8")
_IMAGES = (2, 3, 10, 10)
_VOLUMES = (2, 3, 4, 5, 5)
_MATRIX = (40, 60)

ROWS: tuple[Row, ...] = (
    *(_activation(row) for name, row in ACTIVATIONS.items() if name in autograd.__all__),
    Row("prelu", ("PReLU",), "the input", "2e", "3e", {"input": _x, "weight": _channels}, layer_arguments=(6,)),
    Row(
        *("rrelu", ("RReLU",), "1 bit an element, and a seed", "2e + 1/8", "2e + 1/8"),
        options={"lower": 0.25, "upper": 0.25},  # random slopes: equal bounds leave one right answer
        layer_arguments=(0.25, 0.25),
    ),
    _softmax("log_softmax", "LogSoftmax", 1),
    _softmax("softmax", "Softmax", 1),
    _softmax("softmax", "Softmax2d"),
    _softmax("softmin", "Softmin", 1),
    Row(
        *("gated", (), "the gate and what it gates", "3e", "5e", {"gate": _x, "other": _flipped}, _MATRIX),
        options={"activation": "silu"},
        in_stock=lambda gate, other: F.silu(gate) * other,
    ),
    Row(
        *("gated_channels", (), "the input and the gate", "2e", "3e", {"input": _x, "gate": _of(-1, -2, 1)}),
        in_stock=lambda x, gate: x * F.sigmoid(gate),
    ),
    Row(
        *("gated_halves", (), "the input", "1.5e", "2.5e"),
        shape=_MATRIX,
        options={"activation": "gelu"},
        in_stock=lambda x: F.gelu(x.chunk(2, -1)[1]) * x.chunk(2, -1)[0],
    ),
    Row("glu", ("GLU",), "the input", "1.5e", "2.5e"),
    Row(
        *("highway", (), "the operands", "4e", "7e"),
        {"gate": _x, "transformed": _flipped, "carried": _transposed},
        _MATRIX,
        in_stock=lambda gate, h, x: F.sigmoid(gate) * h + (1 - F.sigmoid(gate)) * x,
    ),
    # --- Normalisation
    Row(
        *("batch_norm", ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"), "the input"),
        *("3e; 2e (evaluation)", "5e; 2e (evaluation)"),
        {"input": _x, "running_mean": _channels, "running_var": _positive, "weight": _channels, "bias": _positive},
        options={"training": True},
        layer_arguments=(6,),
    ),
    Row("batch_norm", ("GlobalContrastNorm",), "the input", "3e", "5e"),
    Row("batch_norm", ("InputNorm",), "the input", "2e", "2e"),
    Row(
        *("batch_norm_act", ("BatchNormAct1d", "BatchNormAct2d", "BatchNormAct3d"), *_WITH_RESIDUAL),
        {"input": _x, "weight": _channels, "bias": _positive, "residual": _flipped},
        options={"running_mean": None, "running_var": None, "training": True},
        in_stock=_batch_norm_act,
    ),
    Row("channel_statistics", (), "nothing", "e", "none", in_stock=_statistics),
    Row("sync_batch_norm", ("SyncBatchNorm",), "the input", "3e", "5e", layer_arguments=(6,)),
    Row("sync_batch_norm", ("SyncBatchNormAct",), *_WITH_RESIDUAL),
    # --- Convolution, pooling, maxout
    Row(
        *("conv1d", ("Conv1d",), "the operands", "cuDNN's", "cuDNN's", {"input": _x, "weight": _of(8, -2, 3)}),
        layer_arguments=(6, 8, 3),
    ),
    Row(
        *("conv2d", ("Conv2d",), "the operands", "cuDNN's", "cuDNN's", {"input": _x, "weight": _of(8, -2, 3, 3)}),
        shape=_IMAGES,
        layer_arguments=(3, 8, 3),
    ),
    Row(
        *("conv3d", ("Conv3d",), "the operands", "cuDNN's", "cuDNN's", {"input": _x, "weight": _of(4, -2, 2, 2, 2)}),
        shape=_VOLUMES,
        layer_arguments=(3, 4, 2),
    ),
    *(
        Row(
            *(f"conv_transpose{directions}d", (f"ConvTranspose{directions}d",), "the operands", "cuDNN's", "cuDNN's"),
            {"input": _x, "weight": _of(-2, 4, *[2] * directions)},
            (2, 3, *[5] * directions),
            layer_arguments=(3, 4, 2),
        )
        for directions in (1, 2, 3)
    ),
    Row(
        "conv_act_pool2d",
        ("ConvAct1d", "ConvAct2d", "ConvAct3d"),
        "the operands, 1 bit an element (ReLU)",
        "2e + 1/8 (after cuDNN's)",
        "2e + 1/8 (before cuDNN's)",
        {"input": _x, "weight": _of(8, -2, 3, 3), "bias": _of(8)},
        _IMAGES,
        {"pool_size": 2},
        lambda x, weight, bias: F.max_pool2d(F.relu(F.conv2d(x, weight, bias)), 2),
    ),
    Row(
        "conv_act_pool2d",
        ("ConvMaxPool1d", "ConvMaxPool2d", "ConvMaxPool3d"),
        "the operands, 4 bits a window (ReLU, 2 x 2)",
        "1.25e + 1/8 (after cuDNN's)",
        "1.25e + 1/8 (before cuDNN's)",
    ),
    Row(
        "conv_batch_norm_act2d",
        ("ConvBatchNormAct1d", "ConvBatchNormAct2d", "ConvBatchNormAct3d"),
        "the operands, the convolution's result, 4 bits a window (ReLU, 2 x 2)",
        "2.25e + 1/8 (after cuDNN's)",
        "5.25e + 1/8 (before cuDNN's)",
        {"input": _x, "weight": _of(8, -2, 3, 3)},
        _IMAGES,
        {"bias": None, "running_mean": None, "running_var": None, "training": True, "pool_size": 2},
        _conv_batch_norm_act,
    ),
    Row(
        *("max_pool1d", ("MaxPool1d",), "1 bit a window of 2, at most 1 byte", "1.5e + 1/16", "1.5e + 1/16"),
        options={"kernel_size": 2},
        layer_arguments=(2,),
    ),
    Row(
        *("max_pool2d", ("MaxPool2d",), "2 bits a window (2 x 2), at most 1 byte", "1.25e + 1/16", "1.25e + 1/16"),
        shape=(4, 6, 10, 10),
        options={"kernel_size": 2},
        layer_arguments=(2,),
    ),
    Row(
        *("max_pool3d", ("MaxPool3d",), "4 bits a window (2 x 2 x 2), at most 1 byte"),
        *("1.125e + 1/16", "1.125e + 1/16"),
        shape=(4, 6, 4, 6, 6),
        options={"kernel_size": 2},
        layer_arguments=(2,),
    ),
    Row(
        *("maxout", (), "1 byte a maximum", "e, and e + 1 a maximum", "e, and e + 1 a maximum"),
        shape=(50, 60),
        options={"pieces": 3},
        in_stock=lambda x: x.unflatten(-1, (-1, 3)).max(-1).values,
    ),
    Row(
        "maxout_conv2d",
        ("MaxoutConv2d",),
        "the operands, 1 byte a maximum",
        "beside the convolution, (pieces + 1) e + 1 a maximum",
        "the same",
        {"input": _x, "weight": _of(2, 5, -2, 3, 3), "bias": _of(2, 5)},
        _IMAGES,
        in_stock=_maxima(F.conv2d),
    ),
    Row(
        "maxout_linear",
        ("Maxout",),
        "the operands, 1 byte a maximum",
        "the operands, e + 1 a maximum",
        "e + 1 a maximum, an expansion of pieces e or none",
        {"input": _x, "weight": _of(3, 20, -2), "bias": _of(3, 20)},
        (30, 24),
        in_stock=_maxima(F.linear),
    ),
    # --- Losses
    _loss("binary_cross_entropy", "BCELoss", _probabilities, lambda x: _probabilities(_transposed(x))),
    _loss("binary_cross_entropy_with_logits", "BCEWithLogitsLoss", target=lambda x: _probabilities(_transposed(x))),
    _loss("huber_loss", "HuberLoss"),
    _loss("kl_div", "KLDivLoss", target=lambda x: _probabilities(_transposed(x))),
    _loss("l1_loss", "L1Loss"),
    _loss("mse_loss", "MSELoss"),
    _loss("smooth_l1_loss", "SmoothL1Loss"),
    Row(
        *("cross_entropy", ("CrossEntropyLoss",), "the input, 8 bytes a sample", "e", "2e"),
        {"input": _log_probabilities, "target": _classes},
        (40, 50),
    ),
    Row(
        *("nll_loss", ("NLLLoss",), "the operands", "e + 8 a target", "e, and e + 8 a target"),
        {"input": _log_probabilities, "target": _classes},
        (40, 50),
    ),
    Row(
        "linear_cross_entropy",
        ("LinearCrossEntropyLoss",),
        "the operands and their gradients",
        "never all logits",
        "-",
        {"input": _x, "linear_weight": _of(50, -2), "target": _classes},
        (40, 16),
        in_stock=lambda x, weight, target: F.cross_entropy(F.linear(x, weight), target),
        layer_arguments=(16, 50),
    ),
    # --- Dropout
    _dropout("alpha_dropout", "AlphaDropout", 100),
    _dropout("dropout", "Dropout", 100),
    _dropout("dropout1d", "Dropout1d", 100),
    _dropout("dropout2d", "Dropout2d", 10, 10),
    _dropout("dropout3d", "Dropout3d", 4, 5, 5),
    _dropout("feature_alpha_dropout", "FeatureAlphaDropout", 100),
    Row(
        "bias_activation_dropout",
        ("BiasActivationDropout",),
        "1 bit an element; the operands and a seed for smooth activations; with a residual no more",
        "2e + 1/8; 2e; 3e + 1/8; 3e",  # of a bit; with a residual
        "2e + 1/8; 3e; 2e + 1/8; 3e",
        {"input": _x, "bias": _of(-2), "residual": lambda x: normal(*reversed(x.shape)).T.to(x)},
        _MATRIX,
        in_stock=lambda kept, x, bias, residual: F.relu(x + bias) * kept * 2 + residual,
        drawn=lambda ours, x, *_: _kept_of_ones(ours, x),
    ),
    Row(
        "block_end",
        (),
        "the scale and a seed; the input, where the scale learns",
        "3e",
        "3e",
        {"input": _x, "residual": _flipped, "scale": _of(-2, 1)},
        options={"p": 0.5},
        in_stock=lambda kept, x, residual, scale: x * scale * kept * 2 + residual,
        drawn=lambda ours, x, _, scale: ours(torch.ones_like(x), torch.zeros_like(x), torch.ones_like(scale)) != 0,
    ),
    Row(
        "drop_connect_linear",
        ("DropConnect",),
        "the operands, and a seed",
        "2e a weight, and the product",
        "4e a weight, and the products",
        {"input": _x, "weight": _of(60, -2), "bias": _of(60)},
        (8, 40),
        in_stock=lambda kept, x, weight, bias: F.linear(x, weight * kept * 2, bias),
        drawn=lambda ours, x, weight, _: ours(torch.eye(x.shape[1]).to(x), torch.ones_like(weight)).T != 0,
    ),
    Row(
        *("standout", ("Standout",), "1 bit an element", "3e + 1/8", "2e + 1/8"),
        {"input": _x, "belief": torch.zeros_like},
        _MATRIX,
        in_stock=lambda kept, x, _: x * kept,
        drawn=_kept_of_ones,
    ),
)


def row_of(name: str) -> Row:
    """The row of a function; of several the first, which has its call."""
    return next(row for row in ROWS if row.name == name)


def row_of_layer(name: str) -> Row:
    """The row of a layer, by the name of its class."""
    return next(row for row in ROWS if name in row.layers)
