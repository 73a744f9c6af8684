"""The second half of ``python -m fusednn check``: every layer, function and optimizer against PyTorch's, with numbers.

What is tested is read off the library: every twin of a ``torch.nn`` layer, every optimizer, and the functions that
neither has.  On a GPU compiled kernels are tested; elsewhere, in a checkout with gcc, on a virtual GPU;
else they run in Triton's interpreter.
"""

from __future__ import annotations

import json
import math
import subprocess
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import kernels, optim
from ..autograd.dispatch import Choice, observe_choices
from ..catalogue import ROWS, Row, normal, row_of_layer
from ..layers.table import format_table
from ..layers.twin import TWINS
from ..optim.twin import TWINS as OPTIMIZER_TWINS
from .kernel_processes import has_virtual_gpu, interpreting_processes, kernel_command

__all__ = ["FUNCTIONS", "Result", "families", "function_sample", "layer_sample", "self_test", "table", "where"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SEED = 0

#: Layers of which PyTorch's own operator is taken on purpose.
_STOCK_ON_PURPOSE = tuple(f"Conv{kind}{n}d" for kind in ("", "Transpose") for n in (1, 2, 3))
#: Layers whose constants PyTorch rounds to float32 even in float64.
_FLOAT32_CONSTANTS = ("CELU", "Hardsigmoid")

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


def layer_sample(stock_class: type[nn.Module]) -> Sample:
    """A call of the twin of a ``torch.nn`` class."""
    name = stock_class.__name__
    row = row_of_layer(name)
    modules: list[Any] = []
    for cls in (TWINS[stock_class], stock_class):
        torch.manual_seed(SEED)
        modules.append(cls(*row.layer_arguments))
    ours, stock = modules
    operands = row.layer_operands(name)
    if "Dropout" in name:
        return Sample(ours, partial(_masked, stock), operands, _kept, 1 - stock.p)
    return Sample(ours, stock, operands)


def function_sample(row: Row) -> Sample:
    """A call of a function that no twin calls."""
    draw = None if row.drawn is None else partial(_again, row.drawn)
    return Sample(row.ours, row.stock, row.operands(normal(*row.shape)), draw, 1.0 if draw is None else 0.5)


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


#: Functions that no twin of a layer calls (or none, in older versions of PyTorch), by name.
FUNCTIONS = {row.name: row for row in ROWS if row.in_stock is not None}


def families() -> list[str]:
    """All that `self_test` has."""
    return sorted(
        {*(_family(twin) for twin in TWINS.values()), *(row.family for row in FUNCTIONS.values()), "optimizer"}
    )


def _family(cls: type) -> str:
    return cls.__module__.rpartition(".")[2]


# --- The test ---------------------------------------------------------------------------------------------------------


def self_test(family: str | None = None, jobs: int = 1) -> list[Result]:
    """Test one family, or all: on the GPU, or if this process has no kernels for CPU tensors in others that do."""
    chosen = [family] if family is not None else families()
    if kernels.ON_CPU or torch.cuda.is_available():
        return [result for name in chosen for result in _test_family(name)]
    if has_virtual_gpu():
        return _on_virtual_gpu(() if family is None else ("--family", family))
    with interpreting_processes(min(jobs, len(chosen))) as processes:
        return [result for results in processes.map(_test_family, chosen) for result in results]


def where() -> str:
    """Where `self_test` runs kernels, in words."""
    if kernels.INTERPRETING or not (kernels.ON_CPU or torch.cuda.is_available() or has_virtual_gpu()):
        return "in Triton's interpreter"
    return "on the GPU" if torch.cuda.is_available() and not kernels.ON_CPU else "compiled, on a virtual GPU"


def _on_virtual_gpu(options: Sequence[str]) -> list[Result]:
    command, variables = kernel_command("check", "--no-compile", "--json", *options)
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(command)} failed with exit status {done.returncode}")
    results = json.loads(done.stdout)["tested"]
    return [Result(**{**result, "problems": tuple(result["problems"])}) for result in results]


def _test_family(family: str) -> list[Result]:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the interpreter computes with NumPy, which speaks up at infinities
        return list(_results(family))


def _results(family: str) -> Iterator[Result]:
    device = "cuda" if torch.cuda.is_available() and not kernels.ON_CPU else "cpu"
    layers = {stock.__name__: partial(layer_sample, stock) for stock, twin in TWINS.items() if _family(twin) == family}
    functions = {name: partial(function_sample, row) for name, row in FUNCTIONS.items() if row.family == family}
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
        parameters = [nn.Parameter(normal(*shape).to(device, dtype).to(kind)) for shape in shapes]
        optimizer: Any = (OPTIMIZER_TWINS[cls] if ours else cls)(parameters, **variant)
        for step in range(2):
            for parameter in parameters:
                gradient = normal(*parameter.shape, 2)[..., step]
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
