"""The second half of ``python -m fusednn check``: every layer, function and optimizer against PyTorch's, with numbers.

What is tested is read off the library: every twin of a ``torch.nn`` layer, every optimizer, and the functions that
neither has.  On a GPU compiled kernels are tested, elsewhere the same kernels in Triton's interpreter.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import autograd, kernels, optim
from ..autograd import stock as F
from ..autograd.dispatch import Choice, observe_choices
from ..layers.table import format_table
from ..layers.twin import TWINS
from ..optim.twin import TWINS as OPTIMIZER_TWINS
from .interpreter import interpreting_processes

__all__ = ["FUNCTIONS", "Result", "families", "layer_sample", "self_test", "table"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SEED = 0

#: Layers of which PyTorch's own operator is taken on purpose.
_STOCK_ON_PURPOSE = ("Conv1d", "Conv2d")
#: Layers whose constants PyTorch rounds to float32 even in float64.
_FLOAT32_CONSTANTS = ("CELU", "Hardsigmoid")

#: What constructors need to be given.
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "PReLU", "SyncBatchNorm"), (6,)),
    **dict.fromkeys(("Conv1d", "Conv2d"), (6, 8, 3)),
    **dict.fromkeys(("LogSoftmax", "Softmax", "Softmin"), (1,)),
    **dict.fromkeys(("MaxPool1d", "MaxPool2d"), (2,)),
    "LinearCrossEntropyLoss": (16, 50),
    "RReLU": (0.25, 0.25),  # random slopes: equal bounds leave one right answer
    "Threshold": (0.1, -1.0),
}

#: Arguments of optimizers that choose another update.
_VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "Adam": ({}, {"amsgrad": True}),
    "AdamW": ({}, {"amsgrad": True}),
    "RMSprop": ({}, {"momentum": 0.9}, {"centered": True}, {"momentum": 0.9, "centered": True}),
    "SGD": ({"lr": 0.1}, {"lr": 0.1, "momentum": 0.9}),
}


class Sample(NamedTuple):
    """A call, ours and in PyTorch's operators.

    Where the call is random, ``draw`` tells which elements our seed keeps, and ``stock`` is given that mask first.
    """

    ours: Callable[..., Any]
    stock: Callable[..., Any]
    operands: tuple[Tensor, ...]
    draw: Callable[..., Tensor] | None = None
    keeps: float = 1.0  # the share that should be kept


@dataclass(frozen=True)
class Result:
    """What the test of one layer, function or optimizer in one dtype found.

    Errors are the largest, in epsilons of the largest value; None where nothing could be compared.
    """

    family: str
    name: str
    dtype: str
    error: float | None
    stock_error: float | None
    problems: tuple[str, ...]


# --- What is tested ---------------------------------------------------------------------------------------------------


def _normal(*shape: int) -> Tensor:
    """Reproducible, on both sides of every activation's knees."""
    generator = torch.Generator().manual_seed(sum(shape))
    return 3 * torch.randn(shape, generator=generator, dtype=torch.float64)


def _image(name: str) -> Tensor:
    """More elements than a program's tile holds, and no multiple of it; as many dimensions as the layer's name says."""
    sizes = {"2d": (10, 10), "3d": (4, 5, 5)}.get(name[-2:], (100,))
    return _normal(4, 6, *sizes)


def _layer_operands(name: str) -> tuple[Tensor, ...]:
    x, t = _normal(40, 50), _normal(50, 40).T
    classes = torch.arange(40) % 50
    if name in ("BCELoss", "BCEWithLogitsLoss", "KLDivLoss"):
        probabilities = t.sigmoid().clamp(0.02, 0.98)  # away from where logarithms overflow in 16 bits
        return (x.sigmoid().clamp(0.02, 0.98) if name == "BCELoss" else x), probabilities
    if name in ("CrossEntropyLoss", "NLLLoss"):
        return x.log_softmax(1), classes
    if name == "LinearCrossEntropyLoss":
        return _normal(40, 16), classes
    return (x, t) if name.endswith("Loss") else (_image(name),)


def layer_sample(stock_class: type[nn.Module]) -> Sample:
    """A call of the twin of a ``torch.nn`` class."""
    name = stock_class.__name__
    modules: list[Any] = []
    for cls in (TWINS[stock_class], stock_class):
        torch.manual_seed(SEED)
        modules.append(cls(*_ARGUMENTS.get(name, ())))
    ours, stock = modules
    operands = _layer_operands(name)
    if "Dropout" in name:
        return Sample(ours, partial(_masked, stock), operands, _kept, 1 - stock.p)
    return Sample(ours, stock, operands)


def _kept(dropout: nn.Module, x: Tensor) -> Tensor:
    """Which elements the next call keeps."""
    kept: Tensor = _again(dropout, torch.ones_like(x)) != _again(dropout, torch.zeros_like(x))
    return kept


def _again(function: Callable[..., Any], *operands: Tensor) -> Any:
    torch.manual_seed(SEED)
    return function(*operands)


def _masked(dropout: nn.Module, kept: Tensor, x: Tensor) -> Tensor:
    """Stock's dropout with another mask: what it makes of kept and of dropped elements is read off what it does."""
    many = torch.ones(1, 64, *x.shape[2:], dtype=torch.float64)
    zeros, ones = (_again(dropout, many * value) for value in (0.0, 1.0))
    offset = {fate: zeros[(zeros != ones) == fate][0].item() for fate in (True, False)}
    scale = (ones - zeros).max().item()
    return torch.where(kept, x * scale + offset[True], offset[False])


def _batch_norm_act(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.batch_norm(x, None, None, weight, bias, training=True) + residual)


def _conv_batch_norm_act(x: Tensor, weight: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(F.batch_norm(F.conv2d(x, weight), None, None, training=True)), 2)


def _maxima(product: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The maximum over pieces, each ``product`` with its own weight and bias."""
    return torch.stack([product(x, w, b) for w, b in zip(weight, bias, strict=True)]).amax(0)


def _statistics(x: Tensor) -> tuple[Tensor, ...]:
    x = x.detach() if x.dtype == torch.float64 else x.detach().float()
    return x.mean((0, 2)), x.var((0, 2), correction=0)


#: By family, functions that no twin of a layer calls (or none, in older versions of PyTorch), and stock's operators.
FUNCTIONS: dict[str, dict[str, Sample]] = {
    "batch_norm": {
        "batch_norm_act": Sample(
            lambda x, residual, w, b: autograd.batch_norm_act(x, None, None, w, b, True, residual=residual),
            _batch_norm_act,
            (_normal(4, 6, 100), _normal(4, 6, 100).flip(0), _normal(6), _normal(6).flip(0)),
        ),
        "channel_statistics": Sample(autograd.channel_statistics, _statistics, (_normal(4, 6, 100),)),
    },
    "bias_activation_dropout": {
        "bias_activation_dropout": Sample(
            autograd.bias_activation_dropout,
            lambda kept, x, bias, residual: F.relu(x + bias) * kept * 2 + residual,
            (_normal(40, 60), _normal(60), _normal(60, 40).T),
            lambda ours, x, *_: _again(ours, torch.ones_like(x)) != 0,
            0.5,
        )
    },
    "conv": {
        "conv_act_pool2d": Sample(
            partial(autograd.conv_act_pool2d, pool_size=2),
            lambda x, w, b: F.max_pool2d(F.relu(F.conv2d(x, w, b)), 2),
            (_normal(2, 3, 10, 10), _normal(8, 3, 3, 3), _normal(8)),
        )
    },
    "conv_batch_norm": {
        "conv_batch_norm_act2d": Sample(
            lambda x, w: autograd.conv_batch_norm_act2d(x, w, None, None, None, training=True, pool_size=2),
            _conv_batch_norm_act,
            (_normal(2, 3, 10, 10), _normal(8, 3, 3, 3)),
        )
    },
    "drop_connect": {
        "drop_connect_linear": Sample(
            autograd.drop_connect_linear,
            lambda kept, x, w, b: F.linear(x, w * kept * 2, b),
            (_normal(8, 40), _normal(60, 40), _normal(60)),
            lambda ours, x, w, _: _again(ours, torch.eye(40).to(x), torch.ones_like(w)).T != 0,
            0.5,
        )
    },
    "linear_cross_entropy": {
        "linear_cross_entropy": Sample(
            autograd.linear_cross_entropy,
            lambda x, w, t: F.cross_entropy(F.linear(x, w), t),
            (_normal(40, 16), _normal(50, 16), torch.arange(40)),
        )
    },
    "maxout": {
        "maxout": Sample(
            partial(autograd.maxout, pieces=3), lambda x: x.unflatten(-1, (-1, 3)).max(-1).values, (_normal(50, 60),)
        ),
        "maxout_conv2d": Sample(
            autograd.maxout_conv2d,
            partial(_maxima, F.conv2d),
            (_normal(2, 3, 8, 8), _normal(2, 5, 3, 3, 3), _normal(2, 5)),
        ),
        "maxout_linear": Sample(
            autograd.maxout_linear, partial(_maxima, F.linear), (_normal(30, 24), _normal(3, 20, 24), _normal(3, 20))
        ),
    },
    "standout": {
        "standout": Sample(
            autograd.standout,
            lambda kept, x, _: x * kept,
            (_normal(40, 60), torch.zeros(40, 60, dtype=torch.float64)),
            lambda ours, x, belief: _again(ours, torch.ones_like(x), belief) != 0,
            0.5,
        )
    },
}


def families() -> list[str]:
    """All that `self_test` has."""
    return sorted({*(_family(twin) for twin in TWINS.values()), *FUNCTIONS, "optimizer"})


def _family(cls: type) -> str:
    return cls.__module__.rpartition(".")[2]


# --- The test ---------------------------------------------------------------------------------------------------------


def self_test(family: str | None = None, jobs: int = 1) -> list[Result]:
    """Test one family, or all: on the GPU, or in new processes with kernels interpreted if this one interprets none."""
    chosen = [family] if family is not None else families()
    if kernels.ON_CPU or torch.cuda.is_available():
        return [result for name in chosen for result in _test_family(name)]
    with interpreting_processes(min(jobs, len(chosen))) as processes:
        return [result for results in processes.map(_test_family, chosen) for result in results]


def _test_family(family: str) -> list[Result]:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the interpreter computes with NumPy, which speaks up at infinities
        return list(_results(family))


def _results(family: str) -> Iterator[Result]:
    device = "cuda" if torch.cuda.is_available() and not kernels.ON_CPU else "cpu"
    layers = {stock.__name__: partial(layer_sample, stock) for stock, twin in TWINS.items() if _family(twin) == family}
    functions = {name: partial(FUNCTIONS[family].__getitem__, name) for name in FUNCTIONS.get(family, {})}
    for (name, make), dtype in product({**layers, **functions}.items(), DTYPES):
        yield _guarded(family, name, dtype, partial(_test, make, name, dtype, device))
    if family == "optimizer":
        for cls, dtype in product(OPTIMIZER_TWINS, DTYPES):
            for variant in _VARIANTS.get(cls.__name__, ({},)):
                name = "-".join((cls.__name__, *(key for key in variant if key != "lr")))
                test = partial(_test_optimizer, cls, variant, dtype, device)
                yield _guarded(family, name, dtype, test)


class _Error(NamedTuple):
    ours: float | None
    stock: float | None
    problem: str | None


def _guarded(family: str, name: str, dtype: torch.dtype, test: Callable[[], _Error]) -> Result:
    """An error that is raised is a result, too."""
    try:
        error = test()
    except Exception as raised:
        error = _Error(None, None, f"{type(raised).__name__}: {(str(raised).splitlines() or [''])[0]}")
    problems = () if error.problem is None else (error.problem,)
    return Result(family, name, str(dtype).removeprefix("torch."), error.ours, error.stock, problems)


def _test(make: Callable[[], Sample], name: str, dtype: torch.dtype, device: str) -> _Error:
    """Values, gradients and buffers of one call."""
    sample = make()
    operands = [x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in sample.operands]
    mine = _to(sample.ours, device, dtype)
    mask = []
    if sample.draw is not None:
        kept = sample.draw(mine, *operands)
        deviation = (sample.keeps * (1 - sample.keeps) / kept.numel()) ** 0.5
        share = kept.double().mean().item()
        if abs(share - sample.keeps) > 6 * deviation:
            return _Error(None, None, f"keeps {share:.3f} of the elements, not {sample.keeps}")
        mask = [kept]
    choices: list[Choice] = []
    with observe_choices(choices.append):
        ours = _evaluate(mine, operands)
    if not any(choice.kernel for choice in choices) and name not in _STOCK_ON_PURPOSE:
        return _Error(None, None, f"took no kernel: {choices[0].reason if choices else 'no choice was made'}")
    reference = _evaluate(_to(sample.stock, device, torch.float64), [_widened(x) for x in operands], mask)
    try:
        stock = _evaluate(_to(sample.stock, device, dtype), operands, mask)
    except RuntimeError:  # stock has no such operator in this dtype
        stock = [exact.to(mine.dtype) for exact, mine in zip(reference, ours, strict=True)]
    return _worst(ours, stock, reference, torch.float32 if name in _FLOAT32_CONSTANTS else dtype)


def _to(function: Callable[..., Any], device: str, dtype: torch.dtype) -> Any:
    return deepcopy(function).to(device, dtype) if isinstance(function, nn.Module) else function


def _widened(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _evaluate(function: Callable[..., Any], operands: Sequence[Tensor], mask: Sequence[Tensor] = ()) -> list[Tensor]:
    """Outputs, gradients with respect to operands and parameters, and buffers after the call."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in operands]
    parameters = list(function.parameters()) if isinstance(function, nn.Module) else []
    buffers = list(function.buffers()) if isinstance(function, nn.Module) else []
    y = _again(function, *mask, *leaves)
    outputs = list(y) if isinstance(y, tuple) else [y]
    gradients: list[Tensor] = []
    if outputs[0].requires_grad:
        seed = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y)
        wanted = [leaf for leaf in (*leaves, *parameters) if leaf.requires_grad]
        found = torch.autograd.grad(y, wanted, seed, allow_unused=True)
        gradients = [gradient for gradient in found if gradient is not None]
    return [tensor.detach() for tensor in (*outputs, *gradients, *buffers) if tensor.is_floating_point()]


def _test_optimizer(
    cls: type[torch.optim.Optimizer], variant: dict[str, Any], dtype: torch.dtype, device: str
) -> _Error:
    """Parameters and state after two steps."""
    shapes = ((40, 60), (7,), ())
    outcomes = []
    for ours, kind in ((True, dtype), (False, dtype), (False, torch.float64)):
        parameters = [nn.Parameter(_normal(*shape).to(device, dtype).to(kind)) for shape in shapes]
        optimizer: Any = (OPTIMIZER_TWINS[cls] if ours else cls)(parameters, **variant)
        for step in range(2):
            for parameter in parameters:
                gradient = _normal(*parameter.shape, 2)[..., step]
                parameter.grad = gradient.to(device, dtype).to(kind)
            if ours and (refused := [path.reason for path in optim.explain(optimizer) if not path.kernel]):
                return _Error(None, None, f"took no kernel: {refused[0]}")
            optimizer.step()
        state = [value for p in parameters for value in optimizer.state[p].values() if isinstance(value, Tensor)]
        outcomes.append([tensor.detach() for tensor in (*parameters, *state)])
    mine, theirs, exact = outcomes
    return _worst(mine, theirs, exact, dtype)


def _worst(
    ours: Sequence[Tensor], stock: Sequence[Tensor], reference: Sequence[Tensor], constants: torch.dtype
) -> _Error:
    """Of all tensors, the largest error of ours and of stock's, and whether ours is within the house rule.

    That is twice stock's own error, at least one rounding of the largest value, plus one rounding; in float64, whose
    reference is stock's result itself, sixteen roundings of the largest value or 1.  ``constants`` is the dtype that
    the operation's constants are rounded to.
    """
    largest_error = largest_stock_error = 0.0
    problem = None
    for mine, theirs, exact in zip(ours, stock, reference, strict=True):
        if not mine.numel():
            continue
        info = torch.finfo(mine.dtype)
        largest = max(exact.abs().max().item(), info.smallest_normal)
        error, stock_error = ((one.double() - exact.double()).abs().max().item() for one in (mine, theirs))
        if not math.isfinite(stock_error):  # stock overflowed
            stock_error = 0.0
        if mine.dtype == torch.float64:
            allowed = 16 * info.eps * max(largest, 1.0)
        else:
            allowed = 2 * max(stock_error, info.eps * largest) + info.eps * largest
        unit = max(info.eps, torch.finfo(constants).eps) * largest
        allowed = max(allowed, unit)
        if not error <= allowed:  # neither is NaN
            problem = f"error of {error / unit:.1f} epsilons, {allowed / unit:.1f} allowed"
        largest_error = max(largest_error, error / unit)
        largest_stock_error = max(largest_stock_error, stock_error / unit)
    return _Error(largest_error, largest_stock_error, problem)


# --- The report -------------------------------------------------------------------------------------------------------


def table(results: Sequence[Result]) -> str:
    """A row per family, and the problems by name."""
    rows = []
    for family in dict.fromkeys(result.family for result in results):
        own = [result for result in results if result.family == family]
        names = list(dict.fromkeys(result.name for result in own))
        tested = ", ".join(names) if len(names) < 5 else f"{', '.join(names[:3])} and {len(names) - 3} more"
        problems = [f"{result.name} {result.dtype}: {what}" for result in own for what in result.problems]
        errors = [_largest(result.error for result in own), _largest(result.stock_error for result in own)]
        rows.append((family, tested, str(len(own)), *errors, "; ".join(problems) or "pass"))
    return format_table(("family", "tested", "cases", "error / eps", "stock's", "result"), rows)


def _largest(errors: Iterable[float | None]) -> str:
    known = [error for error in errors if error is not None]
    return f"{max(known):.1f}" if known else "-"
