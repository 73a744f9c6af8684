"""An operation beside PyTorch's: times on a GPU, counts in Triton's interpreter, the CPU's operators elsewhere."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .. import autograd, kernels
from ..catalogue import Row, row_of
from .arithmetic import eager_work
from .cases import Case, Inputs, Operation
from .ceilings import measure_ceilings
from .clocks import complaint, read_clocks
from .contest import run_clocked_contest, run_contest
from .counting import count_case
from .protocol import COMPILE_MODES, DIRECTIONS, Contest, Direction, Effort, WrongResultError
from .quantiles import median
from .sweep import Measurement, Sweep, of_record
from .timing import DeviceTimer

__all__ = ["MEMORY_FORMATS", "one", "operation_of"]

Shape = tuple[int, ...]

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

#: Operands that gradients aren't asked for.
_CONSTANT = ("belief", "running_mean", "running_var", "target")
#: On a GPU, where no shape is given, the catalogue's is lengthened to about so many elements.
_MANY = 2**24

#: What a machine can't tell, in words.
ON_CPU = (
    "No GPU: fusednn takes PyTorch's own operators here, so ratios say nothing about kernels, and no time about a GPU. "
    "What means something are bytes, and fusednn's host time beside eager's where tensors are small."
)
VIRTUAL = "Kernels run on a virtual GPU: no time here means anything."
INTERPRETED = "Kernels run in Triton's interpreter: bytes and launches are counted, and nothing is timed."


def one(
    operations: str | Operation | Sequence[str | Operation],
    shapes: Shape | Sequence[Shape] | None = None,
    dtypes: torch.dtype | Sequence[torch.dtype] = torch.bfloat16,
    *,
    against: Sequence[str] = ("eager",),
    memory_formats: str | Sequence[str] = "contiguous",
    directions: Sequence[Direction] = DIRECTIONS,
    cold: bool = True,
    effort: Effort | None = None,
    progress: Callable[[str], object] = lambda text: None,
) -> Sweep:
    """Time operations beside PyTorch's, over all shapes, dtypes and memory formats.

    Args:
        operations: names of the catalogue (`fusednn.catalogue.ROWS`), or an `Operation` of your own.
        shapes: of the first operand; the others follow.  By default the catalogue's, on a GPU a longer one.
        dtypes: of floating-point operands.
        against: ``eager``, ``compile`` (``torch.compile`` of stock), ``compile-max-autotune``.
        memory_formats: ``contiguous``, ``channels_last``.
        directions: ``forward`` (which saves what training saves), ``backward``, ``forward_backward``.
        cold: take turns with inputs that together don't fit in the cache; otherwise the same ones again and again.
        effort: how many rounds.
        progress: called with what is being done.

    Returns:
        A `Sweep`; prints as a table, and can be drawn.

    A contestant whose results aren't eager's in float64, that gives the same memory twice, or whose calls the host
    can't enqueue fast enough for a device's time, is refused, with the reason in the table.  Of random operations only
    shapes and dtypes are compared.

    Raises ValueError for an unknown operation, contestant or memory format, and where there would be no warm-up.
    """
    effort = effort or Effort()
    if effort.warmup_rounds < 1:
        raise ValueError("without warm-up, the first call's compilation would be timed")
    if unknown := [name for name in against if name != "eager" and name not in COMPILE_MODES]:
        raise ValueError(f"unknown contestant {unknown[0]}: eager, {', '.join(COMPILE_MODES)}")
    chosen = [operations] if isinstance(operations, (str, Operation)) else operations
    formats = [memory_formats] if isinstance(memory_formats, str) else memory_formats
    kinds = [dtypes] if isinstance(dtypes, torch.dtype) else dtypes
    given: Sequence[Shape | None] = [None] if shapes is None else _listed(shapes)
    on_gpu = torch.cuda.is_available() and not kernels.ON_CPU
    cases = [
        _case(operation, shape, dtype, name, on_gpu)
        for operation, shape, dtype, name in product(chosen, given, kinds, formats)
    ]
    timer = DeviceTimer() if on_gpu else None
    before = read_clocks() if on_gpu else None
    ceilings = measure_ceilings(timer) if timer else {}
    found: list[Measurement] = []
    for case in cases:
        progress(case.id)
        found += _measured(case, timer, ("fusednn", *against), directions, cold, effort)
    notes = [] if on_gpu else [INTERPRETED if kernels.INTERPRETING else VIRTUAL if kernels.ON_CPU else ON_CPU]
    if on_gpu and (words := complaint(before, read_clocks())):
        notes.append(words)
    copy_rate, product_rate = _rate(ceilings, "copy", "bytes"), _rate(ceilings, "matrix_product", "operations")
    return Sweep(tuple(found), copy_rate, product_rate, tuple(notes))


def _listed(shapes: Any) -> Sequence[Shape]:
    return [shapes] if all(isinstance(size, int) for size in shapes) else shapes


def _rate(ceilings: dict[str, dict[str, Any]], name: str, unit: str) -> float | None:
    """A second's."""
    return ceilings[name][unit] / median(ceilings[name]["samples_us"]) * 1e6 if ceilings else None


# --- Cases ------------------------------------------------------------------------------------------------------------


def operation_of(row: Row, memory_format: torch.memory_format = torch.contiguous_format) -> Operation:
    """What is measured of a row of the catalogue.  Budgets that are words there are NaN.

    Where PyTorch has no function of a random operation, stock is given the mask that it would draw.
    """
    random = row.drawn is not None or "dropout" in row.name
    needed = inspect.signature(getattr(autograd, row.name)).parameters.values()
    given = {*row.makers, *row.options}
    if missing := [one.name for one in needed if one.default is one.empty and one.name not in given]:
        raise ValueError(f"{row.name} takes what the catalogue has no values of: {', '.join(missing)}")

    def operands(x: Tensor) -> tuple[Tensor, ...]:
        made = row.operands(x)
        for name, operand in zip(row.makers, made, strict=True):
            wanted = operand.is_floating_point() and name not in _CONSTANT and row.backward != "none"
            operand.requires_grad_(wanted)
        return made

    def budget(shape: torch.Size, dtype: torch.dtype) -> tuple[float, float]:
        try:
            return row.budget(shape, dtype)
        except ValueError:
            return float("nan"), float("nan")

    masks: dict[tuple[Any, ...], Tensor] = {}

    def stock(*given: Tensor) -> Tensor:
        if row.drawn is None:
            return _first(row.stock(*given), given)
        key = (type(given[0]), given[0].shape, given[0].dtype, given[0].device)
        if key not in masks:
            masks[key] = row.drawn(row.ours, *(operand.detach() for operand in given))
        return _first(row.stock(masks[key], *given), given)

    return Operation(
        name=row.name,
        family=row.family,
        ours=lambda *given: _first(row.ours(*given), given),
        stock=stock,
        budget=budget,
        operands=operands,
        output_shape=lambda shape: _result(row, shape).shape,
        memory_format=memory_format,
        check=_check_finite if random else None,
    )


def _first(result: Any, operands: Sequence[Tensor]) -> Tensor:
    """Statistics are several, and float32's."""
    first: Tensor = result[0] if isinstance(result, tuple) else result
    return first.to(operands[0].dtype)


def _result(row: Row, shape: torch.Size) -> Tensor:
    """Without memory."""
    x = torch.empty(shape, dtype=torch.float32, device="meta")
    operands = [operand.to("meta") for operand in row.operands(x)]
    return _first(row.ours(*operands), operands)


def _check_finite(case: Case, y: Tensor, gradients: Sequence[Tensor], inputs: Inputs) -> float:
    """Two random results differ."""
    if not all(bool(one.isfinite().all()) for one in (y, *gradients)):
        raise WrongResultError(f"{case.id}: results aren't finite")
    return 0.0


def _case(operation: str | Operation, shape: Shape | None, dtype: torch.dtype, name: str, on_gpu: bool) -> Case:
    if name not in MEMORY_FORMATS:
        raise ValueError(f"unknown memory format {name}: {', '.join(MEMORY_FORMATS)}")
    if isinstance(operation, str):
        try:
            row = row_of(operation)
        except StopIteration:
            raise ValueError(f"no operation of the catalogue is called {operation}") from None
        operation = operation_of(row, MEMORY_FORMATS[name])
        shape = shape or _usual_shape(row.shape, on_gpu)
    elif shape is None:
        raise ValueError(f"{operation.name} needs a shape")
    return Case(operation, dtype, "x".join(map(str, shape)), tuple(shape))


def _usual_shape(shape: Shape, on_gpu: bool) -> Shape:
    more = _MANY // torch.Size(shape).numel() if on_gpu else 1
    return (shape[0] * more, *shape[1:])


# --- Measuring --------------------------------------------------------------------------------------------------------


def _measured(
    case: Case,
    timer: DeviceTimer | None,
    names: tuple[str, ...],
    directions: Sequence[Direction],
    cold: bool,
    effort: Effort,
) -> list[Measurement]:
    try:
        directions = directions if _has_gradients(case) else [one for one in directions if one == "forward"]
        if kernels.INTERPRETING:
            records = [record for record in count_case(case) if record["direction"] in directions]
            return [of_record(case, record) for record in records if record["contestant"] in names]
        compiled_before = _compilations()
        contest = (
            run_contest(case, timer, names, effort, directions, cold=cold)
            if timer
            else run_clocked_contest(case, names, effort, directions)
        )
        late = "" if "compile" in " ".join(names) or _compilations() == compiled_before else "compiled while timed"
    except Exception as error:  # refused, with its words; the rest of a sweep goes on
        contest, late = Contest(left_out={"fusednn": f"{type(error).__name__}: {str(error).splitlines()[0]}"}), ""
    found = [of_record(case, record, _eager_bytes(case, record), late) for record in contest.records]
    return found + [Measurement.refusal(case, name, reason) for name, reason in contest.left_out.items()]


def _has_gradients(case: Case) -> bool:
    x = torch.empty(case.shape, dtype=torch.float32, device="meta")
    return any(operand.requires_grad for operand in case.operation.operands(x))


def _eager_bytes(case: Case, record: dict[str, Any]) -> float | None:
    """What ATen's operators read and write, for those that aren't ours and aren't compiled."""
    return float(eager_work(case)[record["direction"]].bytes) if record["contestant"] == "eager" else None


def _compilations() -> int:
    """How often Dynamo has compiled in this process."""
    from torch._dynamo.utils import counters

    return int(sum(counters["stats"].values()))
