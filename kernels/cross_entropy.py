"""Cross-entropy of logits along any dimension of a dense tensor, with class indices or probabilities as targets.

With log p = x - max - log(sum(exp(x - max))), weights w of the classes and a line's target t or probabilities q:

================  =============================================================================
`Targets`         loss of a line
================  =============================================================================
``INDICES``       -w[t] log p[t]
``SMOOTHED``      -(1 - s) w[t] log p[t] - s / C sum(w log p), with label smoothing s, C classes
``PROBABILITIES`` -sum(w q log p), with q from ``(1 - s) target + s / C``
================  =============================================================================

The logits are read once, whatever the number of classes; of the longest lines, several programs read a split each
(`long_lines`).  Kept for the backward pass is the log-sum-exp of each line, as the maximum and the logarithm of the sum
beside it: added up, a large maximum would swallow the other's digits.  The gradient, g (m p - what the loss weights
log p with), whose m is the sum of these weights, is then elementwise.

Each program leaves a partial sum of its losses and weights, which are added in a fixed order.
"""

from collections.abc import Iterator, Sequence
from enum import IntEnum
from functools import cache
from math import inf

import torch
from torch import Tensor

from .base._triton import tl, triton
from .base.launch import ACCUMULATOR, COMPUTE, DTYPES, TRITON_TYPE, Configuration, configure, kernel, launch, ships
from .base.layout import dense, dense_like
from .base.lines import (
    ACROSS,
    ALONG,
    LineTiling,
    contiguous_extent,
    line_block,
    line_tile,
    lines_of,
    online_softmax_init,
    online_softmax_reduce,
    online_softmax_update,
    packed_tile,
    part_of_lines,
    reference_point,
    spread,
    sum_of_pairs,
)
from .base.long_lines import LONG_DTYPES, SPLITS, are_shared, join_splits, split_statistics, splits_of
from .base.numerics import divide, fast_exp, log, negative, require, scalar, widen
from .base.partial_sums import SUM_PROGRAMS, combine, divisor_of, finish_sum
from .base.tiles import Tile, cdiv, load, store, threads_for
from .nll_loss import Reduction

__all__ = [
    "Reduction",
    "Targets",
    "class_dim",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "line_shape",
    "line_strides",
    "statistics_shape",
    "targets_of",
    "weight_total_shape",
]


class Targets(IntEnum):
    """What the targets are, and so what a line's loss is."""

    INDICES = 0
    SMOOTHED = 1
    PROBABILITIES = 2


_INDICES = tl.constexpr(int(Targets.INDICES))
_PROBABILITIES = tl.constexpr(int(Targets.PROBABILITIES))
_ALONG = tl.constexpr(ALONG)


@triton.jit
def class_weights(weight_pointer, place, dim_size, has_weight, COMPUTE: tl.constexpr):
    """The weights of the classes at ``place``; 1 where there are none."""
    return tl.load(weight_pointer + place, mask=(place < dim_size) & (has_weight != 0), other=1).to(COMPUTE)


@triton.jit
def line_targets(target_pointer, weight_pointer, line, exists, dim_size, ignore_index, has_weight, CHECK: tl.constexpr):
    """Class indices of the lines, whether they count, and their weights."""
    target = tl.load(target_pointer + line, mask=exists, other=0)
    counts = exists & (target != ignore_index)
    valid = (target >= 0) & (target < dim_size)
    if CHECK:
        require(valid | (counts == 0), "cross-entropy: target is out of bounds")
    counts = counts & valid
    weight = tl.load(weight_pointer + target, mask=counts & (has_weight != 0), other=1)
    return target, counts, weight


# A line's loss is float64, as the sums are that it may go into: nothing is rounded where losses cancel.


@triton.jit
def index_loss(weight, log_total, x_target, maximum):
    """-w log p of the target."""
    log_p = x_target.to(tl.float64) - maximum.to(tl.float64) - log_total.to(tl.float64)
    return negative(weight.to(tl.float64)) * log_p


@triton.jit
def difference(mass, log_total, moment):
    """-sum(w log p), from the sums of w and of w (x - maximum)."""
    return negative(moment.to(tl.float64) - mass.to(tl.float64) * log_total.to(tl.float64))


@kernel
def cross_entropy_forward_kernel(
    x_pointer,  # logits
    target_pointer,  # class indices, (count,); or probabilities, in the memory order of the logits
    weight_pointer,  # weights of the classes, (dim_size,); not read unless `has_weight`
    loss_pointer,  # losses, (count,); not written where `reduced`
    partial_pointer,  # partial sums, see `partial_sums`; these three are written where `reduced`
    value_pointer,  # their sum or mean, one element
    weight_total_pointer,  # sum of the weights, one element; written where `divisor` is 0
    statistics_pointer,  # maximum, log of the sum and, but for indices, sum of weights, each (count,)
    blocks: tl.int64,  # of lines
    count: tl.int64,
    dim_size,
    inner_size,
    ignore_index: tl.int64,
    smoothing: tl.float64,
    has_weight: tl.int32,
    reduced: tl.int32,
    divisor: tl.float64,
    TARGETS: tl.constexpr,
    AXIS: tl.constexpr,
    COMPUTE: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,  # elements of a thread's access
    SPAN: tl.constexpr,  # elements of a line that threads access at once
    THREADS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    packed: tl.constexpr = ALIGN if ALIGN < VECTOR else VECTOR
    spanned: tl.constexpr = SPAN // packed if packed < SPAN else 1
    pairs: tl.constexpr = spanned if spanned < THREADS else THREADS
    smoothing = scalar(smoothing, COMPUTE)
    losses = tl.zeros((LINES,), tl.float64)
    weights = tl.zeros((LINES,), tl.float64)
    for block in range(tl.program_id(0).to(tl.int64), blocks, tl.num_programs(0)):
        lines = line_block(block, count, dim_size, inner_size, AXIS, LINES, ALIGN)
        line, exists = lines.line, lines.exists

        maximum, total = online_softmax_init(COMPUTE, AXIS, LINES, pairs)
        mass = tl.zeros_like(total)  # sum of the weights of log p
        moment = tl.zeros_like(total)  # sum of weighted (x - maximum)
        for first in range(0, dim_size, WIDTH):
            tile, place = packed_tile(lines, first, AXIS, WIDTH, pairs, packed)
            x = load(x_pointer, tile, COMPUTE, float("-inf"))
            previous = reference_point(maximum)
            maximum, total = online_softmax_update(maximum, total, x, AXIS)
            if TARGETS != _INDICES:
                weight = class_weights(weight_pointer, place, dim_size, has_weight, COMPUTE)
                if TARGETS == _PROBABILITIES:
                    q = load(target_pointer, tile, COMPUTE)
                    weight *= q * (1 - smoothing) + smoothing / dim_size
                weight = tl.where(tile.inside, weight, 0.0)
                reference = reference_point(maximum)
                weighted_x = tl.where(tile.inside, weight * (x - spread(reference, AXIS)), 0.0)
                moment += (previous - reference) * mass + sum_of_pairs(weighted_x, AXIS)
                mass += sum_of_pairs(weight, AXIS)

        references = reference_point(maximum)
        maximum, total = online_softmax_reduce(maximum, total, AXIS)
        log_total = log(total)
        if TARGETS != _INDICES and AXIS == _ALONG:
            moment = tl.sum(moment + (references - reference_point(maximum)[:, None]) * mass, 1)
            mass = tl.sum(mass, 1)
        if TARGETS == _PROBABILITIES:
            loss = tl.where(exists, difference(mass, log_total, moment), 0.0)
            weight = exists.to(COMPUTE)
        else:
            target, counts, weight = line_targets(
                target_pointer, weight_pointer, line, exists, dim_size, ignore_index, has_weight, True
            )
            place = lines.start + lines.offsets
            if AXIS == _ALONG:
                x_target = tl.load(x_pointer + place + target, mask=counts, other=0)
            else:
                x_target = tl.load(x_pointer + place + target * inner_size, mask=counts, other=0)
            loss = index_loss(weight, log_total, widen(x_target, COMPUTE), maximum)
            if TARGETS != _INDICES:
                loss = (1 - smoothing) * loss + smoothing / dim_size * difference(mass, log_total, moment)
                mass = (1 - smoothing) * weight + smoothing / dim_size * mass
            loss = tl.where(counts, loss, 0.0)
            weight = tl.where(counts, weight, 0.0)

        tl.store(statistics_pointer + line, maximum, mask=exists)
        tl.store(statistics_pointer + count + line, log_total, mask=exists)
        if TARGETS != _INDICES:
            tl.store(statistics_pointer + 2 * count + line, mass, mask=exists)
        if reduced:
            losses += loss
            weights += weight
        else:
            tl.store(loss_pointer + line, loss.to(COMPUTE), mask=exists)
    if reduced:
        finish_sum(partial_pointer, value_pointer, weight_total_pointer, losses, weights, divisor, COMPUTE)


@kernel
def long_cross_entropy_kernel(
    x_pointer,
    split_pointer,  # maximum and sum of exponentials of the lines' splits, see `long_lines`
    target_pointer,  # class indices
    weight_pointer,
    loss_pointer,  # this and what follows as above
    partial_pointer,
    value_pointer,
    weight_total_pointer,
    statistics_pointer,
    blocks: tl.int64,
    count: tl.int64,
    dim_size,
    splits: tl.int32,
    ignore_index: tl.int64,
    has_weight: tl.int32,
    reduced: tl.int32,
    divisor: tl.float64,
    LINES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    losses = tl.zeros((LINES,), tl.float64)
    weights = tl.zeros((LINES,), tl.float64)
    for block in range(tl.program_id(0).to(tl.int64), blocks, tl.num_programs(0)):
        line = block * LINES + tl.arange(0, LINES)
        exists = line < count
        maximum, total = join_splits(split_pointer, line, exists, count, splits, SPLITS)
        log_total = log(total)
        target, counts, weight = line_targets(
            target_pointer, weight_pointer, line, exists, dim_size, ignore_index, has_weight, True
        )
        x_target = widen(tl.load(x_pointer + line * dim_size + target, mask=counts, other=0), tl.float32)
        loss = tl.where(counts, index_loss(weight, log_total, x_target, maximum), 0.0)
        tl.store(statistics_pointer + line, maximum, mask=exists)
        tl.store(statistics_pointer + count + line, log_total, mask=exists)
        if reduced:
            losses += loss
            weights += tl.where(counts, weight, 0.0)
        else:
            tl.store(loss_pointer + line, loss.to(tl.float32), mask=exists)
    if reduced:
        finish_sum(partial_pointer, value_pointer, weight_total_pointer, losses, weights, divisor, tl.float32)


@kernel
def cross_entropy_backward_kernel(
    g_pointer,  # gradients of the losses, (count,); or, `reduced`, of their sum or mean, ()
    weight_total_pointer,  # sum of the weights, one element; read where `divisor` is 0
    x_pointer,  # logits
    target_pointer,
    weight_pointer,
    statistics_pointer,
    dx_pointer,  # gradient of the logits; not written unless `wants_dx`
    dtarget_pointer,  # gradient of the probabilities; not written unless `wants_dtarget`
    count: tl.int64,
    dim_size,
    inner_size,
    chunks: tl.int32,  # of a line
    ignore_index: tl.int64,
    smoothing: tl.float64,
    has_weight: tl.int32,
    reduced: tl.int32,
    divisor: tl.float64,
    wants_dx: tl.int32,
    wants_dtarget: tl.int32,
    TARGETS: tl.constexpr,
    AXIS: tl.constexpr,
    COMPUTE: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    lines, chunk = part_of_lines(count, dim_size, inner_size, chunks, AXIS, LINES, ALIGN)
    line, exists = lines.line, lines.exists
    tile, place = line_tile(lines, chunk.to(tl.int32) * WIDTH, AXIS, WIDTH)
    smoothing = scalar(smoothing, COMPUTE)

    g = tl.load(g_pointer + tl.where(reduced != 0, 0, line), mask=exists, other=0)
    divisor = divisor_of(divisor, weight_total_pointer, COMPUTE)
    scale = divide(g, divisor)
    maximum = tl.expand_dims(tl.load(statistics_pointer + line, mask=exists, other=0), AXIS)
    log_total = tl.expand_dims(tl.load(statistics_pointer + count + line, mask=exists, other=0), AXIS)
    x = load(x_pointer, tile, COMPUTE)
    log_p = x - maximum - log_total

    if TARGETS == _PROBABILITIES:
        q = load(target_pointer, tile, COMPUTE)
        weight = class_weights(weight_pointer, place, dim_size, has_weight, COMPUTE)
        target_weight = weight * (q * (1 - smoothing) + smoothing / dim_size)
        scale = tl.expand_dims(scale, AXIS)
        dtarget = negative(scale) * (1 - smoothing) * weight * log_p
        store(dtarget_pointer, Tile(tile.start, tile.offsets, tile.inside & (wants_dtarget != 0)), dtarget)
    else:
        target, counts, mass = line_targets(
            target_pointer, weight_pointer, line, exists, dim_size, ignore_index, has_weight, False
        )
        scale = tl.expand_dims(tl.where(counts, scale, 0.0), AXIS)
        target_weight = tl.where(place == tl.expand_dims(target, AXIS), tl.expand_dims(mass, AXIS), 0.0)
        if TARGETS != _INDICES:
            weight = class_weights(weight_pointer, place, dim_size, has_weight, COMPUTE)
            target_weight = (1 - smoothing) * target_weight + smoothing / dim_size * weight
    if TARGETS != _INDICES:
        mass = tl.load(statistics_pointer + 2 * count + line, mask=exists, other=0)
    dx = scale * (tl.expand_dims(mass, AXIS) * fast_exp(log_p) - target_weight)
    store(dx_pointer, Tile(tile.start, tile.offsets, tile.inside & (wants_dx != 0)), dx)


# --- Configurations and launchers -----------------------------------------------------------------------------------

# Tiles, lines x elements of each, by the longest line that takes them.  A lane holds 16 or 32 elements, of short lines
# up to 128, and where it can a warp holds whole lines: what is computed once for a line is computed once for many
# elements.  Class indices, the usual targets, get more shapes.
_Tiles = dict[float, tuple[int, int]]
_TILES: dict[str, dict[int, _Tiles]] = {
    "forward": {
        ALONG: {16: (128, 16), 64: (64, 64), 128: (64, 128), 1024: (16, 256), 4096: (4, 1024), inf: (1, 4096)},
        ACROSS: {inf: (64, 32)},
    },
    "backward": {ALONG: {16: (128, 16), 128: (16, 128), inf: (2, 1024)}, ACROSS: {32: (64, 32), inf: (64, 128)}},
}
_FEWER_TILES: dict[str, dict[int, _Tiles]] = {
    "forward": {ALONG: {128: (16, 128), 1024: (8, 256), inf: (1, 2048)}, ACROSS: {inf: (64, 32)}},
    "backward": {ALONG: {128: (16, 128), inf: (2, 1024)}, ACROSS: {inf: (64, 32)}},
}


def _tiles(direction: str, dtype: torch.dtype, targets: Targets, axis: int) -> _Tiles:
    usual = targets is Targets.INDICES and dtype is not torch.float64
    return (_TILES if usual else _FEWER_TILES)[direction][axis]


def _elements(direction: str, dtype: torch.dtype, targets: Targets) -> dict[str, torch.dtype]:
    """What the kernels' pointers point to, beside the input and its gradient."""
    statistics = ("weight", "loss", "value", "statistics", *(["g"] if direction == "backward" else []))
    return {
        **dict.fromkeys(statistics, ACCUMULATOR[dtype]),
        **dict.fromkeys(("partial", "weight_total"), torch.float64),
        "target": dtype if targets is Targets.PROBABILITIES else torch.int64,
    }


def _accesses(dtype: torch.dtype, tiling: LineTiling, threads: int) -> dict[str, int]:
    """What the forward pass's threads access at once.  Where a warp has several lines it is a part of each, so that
    the lines' ends come at once, too.  Two threads take a whole sector of memory; the shortest lines have one each.
    """
    vector = 16 // dtype.itemsize
    threads_of_line = max(threads // tiling.lines, 2)
    span = min(threads_of_line * vector, tiling.width) if tiling.width > 16 else 1
    return {"VECTOR": vector, "SPAN": span, "THREADS": threads}


@cache
def _configuration(direction: str, dtype: torch.dtype, targets: Targets, tiling: LineTiling) -> Configuration:
    axis = tiling.axis
    elements = tiling.lines * tiling.width
    short = axis == ALONG and tiling.lines == 64  # the end of a line costs as much as its elements
    threads = tiling.lines if short else max(elements // 32, threads_for(dtype))
    # Else registers run out, with one Triton or another.
    if short and tiling.width == 64 and dtype is torch.float32:
        threads *= 2
    if targets is not Targets.INDICES and direction == "forward":
        threads = elements // (8 if targets is Targets.PROBABILITIES and dtype is torch.float64 else 4)
    elif targets is Targets.PROBABILITIES and axis == ACROSS:
        threads *= 2
    reads = 2 if targets is Targets.PROBABILITIES else 1
    wide = elements * dtype.itemsize // (threads * 16)
    if direction == "forward":
        code, own, stores = cross_entropy_forward_kernel, _accesses(dtype, tiling, threads), 0
    else:
        code, own, stores = cross_entropy_backward_kernel, {}, wide
    place = "along" if axis == ALONG else "across"
    return configure(
        code,
        f"cross_entropy {direction} {targets.name.lower()} {place} {tiling.lines}x{tiling.width} {TRITON_TYPE[dtype]}",
        dtype,
        {
            "TARGETS": int(targets),
            **tiling.constants,
            "COMPUTE": COMPUTE[dtype],
            **own,
        },
        aligned=(contiguous_extent(axis),),
        pointers=_elements(direction, dtype, targets),
        threads=threads,
        wide_loads=reads * wide,
        wide_stores=stores,
        asserts=direction == "forward" and targets is not Targets.PROBABILITIES,
        rare=dtype not in (torch.bfloat16, torch.float32),
    )


_LONG_LINES = 16  # of a program


@cache
def _long_configuration(dtype: torch.dtype) -> Configuration:
    return configure(
        long_cross_entropy_kernel,
        f"cross_entropy forward indices long {TRITON_TYPE[dtype]}",
        dtype,
        {"LINES": _LONG_LINES, "SPLITS": SPLITS},
        pointers={**_elements("forward", dtype, Targets.INDICES), "split": torch.float32},
        threads=128,
        asserts=True,
        rare=dtype not in (torch.bfloat16, torch.float32),
    )


@ships("cross_entropy")
def configurations() -> Iterator[Configuration]:
    # The second stage of the sum is among those of `pointwise_loss`.
    for dtype in DTYPES:
        for targets in Targets:
            for direction in ("forward", "backward"):
                for axis in (ALONG, ACROSS):
                    for tile in _tiles(direction, dtype, targets, axis).values():
                        yield _configuration(direction, dtype, targets, LineTiling(axis, *tile))
    yield from map(_long_configuration, LONG_DTYPES)


def _configuration_for(
    direction: str, dtype: torch.dtype, targets: Targets, axis: int, dim_size: int
) -> tuple[Configuration, LineTiling]:
    """The configuration for lines of ``dim_size`` elements, and its tiles."""
    tiles = _tiles(direction, dtype, targets, axis)
    tiling = LineTiling(axis, *next(tile for longest, tile in tiles.items() if dim_size <= longest))
    return _configuration(direction, dtype, targets, tiling), tiling


def targets_of(x: Tensor, target: Tensor, smoothing: float) -> Targets:
    """What kind of target it is.  As PyTorch decides: probabilities have the shape of the logits."""
    if target.shape == x.shape:
        return Targets.PROBABILITIES
    return Targets.SMOOTHED if smoothing > 0 else Targets.INDICES


def class_dim(shape: Sequence[int]) -> int:
    """The dimension of the classes in logits of this shape: the second, or the only one."""
    return min(len(shape) - 1, 1)


def line_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of logits without their classes."""
    dim = class_dim(shape)
    return (*shape[:dim], *shape[dim + 1 :])


def line_strides(x: Tensor) -> tuple[int, ...]:
    """Strides of a tensor with an element for each line of ``x``, in the order in which the lines lie in memory."""
    dim = class_dim(x.shape)
    classes, inner_size = x.shape[dim], x.stride(dim)
    rest = [stride for position, stride in enumerate(x.stride()) if position != dim]
    return tuple(stride if classes == 1 or stride < inner_size else stride // classes for stride in rest)


def _arranged(x: Tensor, target: Tensor, targets: Targets) -> Tensor:
    """The target in the memory order of the logits."""
    return dense_like(target, x.stride() if targets is Targets.PROBABILITIES else line_strides(x))


def cross_entropy_forward(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: Reduction,
    ignore_index: int,
    smoothing: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss in ``dtype``, the statistics of the lines, and for a mean the sum of the weights.

    Raises `DeviceAssertionError` in the interpreter where a target is out of bounds.
    """
    x = dense(x)
    targets = targets_of(x, target, smoothing)
    target = _arranged(x, target, targets)
    lines = lines_of(x, class_dim(x.shape))
    long = targets is Targets.INDICES and are_shared(lines, x.dtype)
    configuration, tiling = _configuration_for("forward", x.dtype, targets, lines.axis, lines.dim_size)
    blocks = lines.blocks(_LONG_LINES if long else tiling.lines)
    reduced = reduction != "none"
    programs = min(blocks, SUM_PROGRAMS) if reduced else blocks
    accumulator = ACCUMULATOR[x.dtype]
    statistics = torch.empty(statistics_shape(x, targets), dtype=accumulator, device=x.device)
    loss = statistics if reduced else statistics.new_empty_strided(line_shape(x.shape), line_strides(x))
    partial = torch.empty((2, programs if reduced else 0), dtype=torch.float64, device=x.device)
    combined = reduced and programs > 1
    value = torch.empty((), dtype=dtype if combined else accumulator, device=x.device)
    weight_total = torch.empty(weight_total_shape(reduction), dtype=torch.float64, device=x.device)
    divisor = 0.0 if reduction == "mean" else 1.0
    operands = (target, statistics if weight is None else weight.to(accumulator).contiguous())
    results = (loss, partial, statistics if combined else value, weight_total, statistics)
    flags = (int(weight is not None), int(reduced), divisor)
    if long:
        splits = splits_of(lines)
        extents = (blocks, lines.count, lines.dim_size, splits.number)
        partial_lines = split_statistics(x, lines, splits)
        launch(
            _long_configuration(x.dtype),
            programs,
            x,
            partial_lines,
            *operands,
            *results,
            *extents,
            ignore_index,
            *flags,
        )
    else:
        options = (ignore_index, smoothing, *flags)
        launch(configuration, programs, x, *operands, *results, blocks, *lines.extents, *options)
    if not reduced:
        return loss.to(dtype), statistics, weight_total
    combine(partial, value, weight_total, divisor)
    return value.to(dtype), statistics, weight_total


def statistics_shape(x: Tensor, targets: Targets) -> tuple[int, int]:
    """Maximum and logarithm of the sum for each line; and the sum of weights, where it isn't the target's own."""
    return 2 if targets is Targets.INDICES else 3, x.numel() // x.shape[class_dim(x.shape)]


def weight_total_shape(reduction: Reduction) -> tuple[int, ...]:
    """The sum of the weights is one number for a mean, else nothing."""
    return () if reduction == "mean" else (0,)


def cross_entropy_backward(
    g: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    weight_total: Tensor,
    reduction: Reduction,
    ignore_index: int,
    smoothing: float,
    needed: Sequence[bool],
    *,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of the logits and of the probabilities, where ``needed``; otherwise nothing.

    ``overwrite`` writes the gradient over the (dense) logits.
    """
    x = dense(x)
    targets = targets_of(x, target, smoothing)
    target = _arranged(x, target, targets)
    lines = lines_of(x, class_dim(x.shape))
    configuration, tiling = _configuration_for("backward", x.dtype, targets, lines.axis, lines.dim_size)
    chunks = cdiv(lines.dim_size, tiling.width)
    reduced = reduction != "none"
    g = g.to(statistics.dtype) if reduced else dense_like(g.to(statistics.dtype), line_strides(x))
    dx = (x if overwrite else torch.empty_like(x)) if needed[0] else x.new_empty(0)
    dtarget = torch.empty_like(x) if needed[1] else x.new_empty(0)
    launch(
        configuration,
        lines.blocks(tiling.lines) * chunks,
        *(g, weight_total, x, target),
        *(statistics if weight is None else weight.to(statistics.dtype).contiguous(), statistics),
        *(dx, dtarget),
        *lines.extents,
        *(chunks, ignore_index, smoothing, int(weight is not None), int(reduced)),
        *(0.0 if reduction == "mean" else 1.0, int(needed[0]), int(needed[1])),
    )
    return dx, dtarget
