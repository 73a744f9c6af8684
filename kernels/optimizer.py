"""Optimizers: one kernel that updates many parameters by the rules of ``functions/optimizer.py``.

A program owns a chunk of one parameter.  It computes the algorithm's coefficients once, in float64, from numbers that
it reads or is given, so that nothing which changes from step to step is a constant of the kernel; then it reads weight,
gradient and state, and writes weight and state.  Clipping, penalties, averaging and master weights happen on the way.

Clipping by the gradients' norm needs it beforehand: `optimizer_squares_kernel` leaves a fixed number of partial sums,
which every program of the update adds up in the same order.
"""

from collections.abc import Iterator
from enum import IntEnum
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from .base._triton import tl, triton
from .base.launch import COMPUTE, DTYPES, TRITON_TYPE, Configuration, configure, kernel, launch, ships
from .base.multi_tensor import SETTINGS
from .base.numerics import divide, narrow, scalar, square_root, widen
from .base.tiles import TILE, threads_for
from .functions.optimizer import ALGORITHMS

__all__ = ["Penalty", "Settings", "Variant", "launch_squares", "launch_update"]


class Settings(NamedTuple):
    """What a launch needs to know beside its tensors.  ``a``, ``b`` and ``c`` are the algorithm's own.

    ``lr`` is a factor of the learning rate that the launch is given, ``sign`` -1 to maximize.  Gradients are divided by
    ``scale``; nothing is updated where ``found_inf`` isn't 0.  A negative ``average_decay`` asks for the plain mean.
    """

    lr: float = 1.0
    weight_decay: float = 0.0
    decoupled_weight_decay: float = 0.0
    a: float = 0.0
    b: float = 0.0
    c: float = 0.0
    eps: float = 0.0
    sign: float = 1.0
    scale: float = 1.0
    found_inf: float = 0.0
    clip_norm: float = float("inf")
    clip_value: float = float("inf")
    l1: float = 0.0
    l2: float = 0.0
    group_lasso: float = 0.0
    average_decay: float = 0.0


assert len(Settings._fields) == SETTINGS

_SETTINGS = tl.constexpr(SETTINGS)


class Penalty(IntEnum):
    """The proximal steps that follow an update."""

    NONE = 0
    ELEMENTS = 1  # L1 and L2
    GROUPS = 2  # these, and the group lasso


_ELEMENTS = tl.constexpr(int(Penalty.ELEMENTS))
_GROUPS = tl.constexpr(int(Penalty.GROUPS))

#: Programs, and partial sums, of the gradients' norm.
SQUARES = 512
_SQUARES = tl.constexpr(SQUARES)

# What isn't aligned, or a whole tile, is walked in smaller ones: an address for each element takes many registers.
_NARROW = tl.constexpr(512)

# --- Kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def chunk_place(table_pointer, program, tensors, COLUMNS: tl.constexpr):
    """The tensor that a program's chunk belongs to, its first element, how many it has, and how many a group has."""
    extents = table_pointer + _SETTINGS + COLUMNS * tensors
    word = tl.load(extents + 5 * tensors + program)
    tensor = word >> 32
    length = tl.load(extents + tensors + tensor)
    start = (word & 0xFFFFFFFF) * length
    count = tl.minimum(length, tl.load(extents + tensor) - start)
    return tensor, start, count, tl.load(extents + 2 * tensors + tensor)


@triton.jit
def operand_address(table_pointer, column, tensors, tensor, start, ELEMENT: tl.constexpr):
    """Where element ``start`` of an operand lies."""
    return tl.load(table_pointer + _SETTINGS + column * tensors + tensor) + start * (ELEMENT.primitive_bitwidth // 8)


@triton.jit
def load_operand(address, place, COMPUTE: tl.constexpr, ELEMENT: tl.constexpr, WIDE: tl.constexpr):
    """A tile of an operand; unmasked, 128 bits at a time, where ``WIDE``.  ``place``: start, offsets, and inside."""
    pointer = address.to(tl.pointer_type(ELEMENT)) + place[0]
    if WIDE:
        tile = tl.load(tl.multiple_of(pointer, 16) + place[1])
    else:
        tile = tl.load(pointer + place[1], mask=place[2], other=0)
    return widen(tile, COMPUTE)


@triton.jit
def store_operand(address, place, tile, ELEMENT: tl.constexpr, WIDE: tl.constexpr):
    pointer = address.to(tl.pointer_type(ELEMENT)) + place[0]
    if WIDE:
        tl.store(tl.multiple_of(pointer, 16) + place[1], narrow(tile, ELEMENT))
    else:
        tl.store(pointer + place[1], narrow(tile, ELEMENT), mask=place[2])


@triton.jit
def load_weights(
    addresses, place, COMPUTE: tl.constexpr, ELEMENTS: tl.constexpr, MASTER: tl.constexpr, WIDE: tl.constexpr
):
    """The master copy where there is one, otherwise the parameter itself."""
    column: tl.constexpr = MASTER if MASTER else 0
    return load_operand(addresses[column], place, COMPUTE, ELEMENTS[column], WIDE)


@triton.jit
def store_weights(
    w,
    addresses,
    place,
    average_share,
    COMPUTE: tl.constexpr,
    ELEMENTS: tl.constexpr,
    MASTER: tl.constexpr,
    AVERAGE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Store new weights: the parameter, its master copy, and their average."""
    store_operand(addresses[0], place, w, ELEMENTS[0], WIDE)
    if MASTER:
        store_operand(addresses[MASTER], place, w, COMPUTE, WIDE)
    if AVERAGE:
        stored = w if MASTER else widen(narrow(w, ELEMENTS[0]), COMPUTE)
        average = load_operand(addresses[AVERAGE], place, COMPUTE, COMPUTE, WIDE)
        store_operand(addresses[AVERAGE], place, average + average_share * (stored - average), COMPUTE, WIDE)


@triton.jit
def update_tile(
    addresses,
    place,
    of_gradient,  # factor, limit, weight decay: what makes the gradient used of that given; and what only unscales it
    of_weight,  # factor that decays weights, threshold and factor of the penalty, share in the average
    coefficients,
    UPDATE: tl.constexpr,
    STATES: tl.constexpr,
    MASTER: tl.constexpr,
    AVERAGE: tl.constexpr,
    PENALTY: tl.constexpr,
    UNSCALES: tl.constexpr,
    COMPUTE: tl.constexpr,
    ELEMENTS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Update a tile; returns the sum of the new weights' squares where there is a penalty on groups, otherwise 0."""
    w = load_weights(addresses, place, COMPUTE, ELEMENTS, MASTER, WIDE)
    g = load_operand(addresses[1], place, COMPUTE, ELEMENTS[1], WIDE)
    states = ()  # grown by sums of tuples: Triton knows no stars
    for i in tl.static_range(STATES):
        states = states + (load_operand(addresses[2 + i], place, COMPUTE, ELEMENTS[2 + i], WIDE),)  # type: ignore[assignment]  # noqa: RUF005

    factor, limit, weight_decay, inverse_scale = of_gradient
    if UNSCALES:
        store_operand(addresses[1], place, g * inverse_scale, ELEMENTS[1], WIDE)
    g = g * factor
    g = tl.where(g > limit, limit, tl.where(g < -limit, -limit, g))  # NaN stays
    g = tl.where(weight_decay != 0, g + weight_decay * w, g)
    kept, threshold, shrinkage, average_share = of_weight
    w, states = UPDATE(w * kept, g, states, coefficients)
    if PENALTY:
        w = tl.where(w > threshold, w - threshold, tl.where(w < -threshold, w + threshold, w * 0)) * shrinkage

    for i in tl.static_range(STATES):
        store_operand(addresses[2 + i], place, states[i], ELEMENTS[2 + i], WIDE)
    # The average is of what the penalty on groups leaves.
    store_weights(
        w, addresses, place, average_share, COMPUTE, ELEMENTS, MASTER, 0 if PENALTY == _GROUPS else AVERAGE, WIDE
    )
    if PENALTY == _GROUPS:
        total = tl.sum(tl.where(place[2], w * w, 0.0), axis=0)
    else:
        total = threshold * 0
    return total


@triton.jit
def places_of(pointer):
    """Where each of the `Settings` lies: one is read where it is used."""
    places = ()
    for i in tl.static_range(_SETTINGS):
        places = places + (pointer + i,)  # type: ignore[assignment]  # noqa: RUF005
    return Settings(*places)


@triton.jit
def clip_coefficient(squares_pointer, squares, scale, clip_norm):
    """What ``clip_grad_norm_`` multiplies gradients by, from the partial sums of the scaled gradients' squares."""
    total = scalar(0.0, tl.float64)
    for start in range(0, squares, _SQUARES):
        place = start + tl.arange(0, _SQUARES)
        total += tl.sum(tl.load(squares_pointer + place, mask=place < squares, other=0), axis=0)
    coefficient = clip_norm / (square_root(total) / tl.abs(scale) + 1e-6)
    return tl.where(coefficient > 1, 1.0, coefficient)  # NaN stays


# What is read one number at a time may lie anywhere, and gains nothing by lying well.
@partial(kernel, unaligned=("scalars_pointer", "averages_pointer", "squares_pointer"))
def optimizer_update_kernel(
    table_pointer,  # words of a `Table`: settings, addresses, extents, scalars, programs
    settings_pointer,  # `Settings`: the table's, or a copy in which some were computed on the device
    scalars_pointer,  # step and mu_product of each tensor, (2, tensors), relative to those given below
    averages_pointer,  # how many weights each tensor's average will be of, (tensors,); unused where there is none
    squares_pointer,  # partial sums of the gradients' squares
    tensors: tl.int64,
    squares: tl.int32,  # how many; 0 where gradients aren't clipped by their norm
    lr: tl.float64,
    step: tl.float64,
    mu_product: tl.float64,
    COEFFICIENTS: tl.constexpr,
    UPDATE: tl.constexpr,
    STATES: tl.constexpr,
    MASTER: tl.constexpr,  # column of the master weights, 0 where there are none
    AVERAGE: tl.constexpr,  # column of the average, 0 where there is none
    PENALTY: tl.constexpr,
    UNSCALES: tl.constexpr,  # whether gradients are left divided by the scale
    COMPUTE: tl.constexpr,
    ELEMENTS: tl.constexpr,  # type of each column: parameter, gradient, states, master weights, average
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    tensor, start, count, group = chunk_place(table_pointer, tl.program_id(0), tensors, COLUMNS)
    addresses = ()
    low_bits = start * 0
    for column in tl.static_range(COLUMNS):
        address = operand_address(table_pointer, column, tensors, tensor, start, ELEMENTS[column])
        addresses = addresses + (address,)  # type: ignore[assignment]  # noqa: RUF005
        low_bits = low_bits | address
    aligned = (low_bits & 15) == 0

    settings = places_of(settings_pointer)
    lr = scalar(lr, tl.float64) * tl.load(settings.lr)
    coefficients = COEFFICIENTS(
        lr,
        tl.load(settings.a),
        tl.load(settings.b),
        tl.load(settings.c),
        tl.load(settings.eps),
        scalar(step, tl.float64) + tl.load(scalars_pointer + tensor),
        scalar(mu_product, tl.float64) + tl.load(scalars_pointer + tensors + tensor),
    )
    scale = tl.load(settings.scale)
    clip = clip_coefficient(squares_pointer, squares, scale, tl.load(settings.clip_norm))
    of_gradient_exactly = (
        tl.load(settings.sign) * clip / scale,
        tl.load(settings.clip_value),
        tl.load(settings.weight_decay),
        1 / scale,
    )
    average_share = lr
    if AVERAGE:
        average_decay = tl.load(settings.average_decay)
        averages = tl.load(averages_pointer + tensor)
        average_share = tl.where((average_decay < 0) | (averages <= 1), 1 / averages, 1 - average_decay)
    of_weight_exactly = (
        1 - lr * tl.load(settings.decoupled_weight_decay),
        lr * tl.load(settings.l1),
        1 / (1 + lr * tl.load(settings.l2)),
        average_share,
    )
    coefficients = [number.to(COMPUTE) for number in coefficients]
    of_gradient = [number.to(COMPUTE) for number in of_gradient_exactly]
    of_weight = [number.to(COMPUTE) for number in of_weight_exactly]

    count = tl.where(tl.load(settings.found_inf) != 0, 0, count)  # after an overflow: empty loops
    squares_of_weights = (lr * 0).to(COMPUTE)
    offsets = tl.arange(0, TILE)
    few_offsets = tl.arange(0, _NARROW)
    for done in range(0, count, TILE):
        if aligned & (done + TILE <= count):
            squares_of_weights += update_tile(
                *(addresses, (done, offsets, offsets < TILE), of_gradient, of_weight, coefficients),
                *(UPDATE, STATES, MASTER, AVERAGE, PENALTY, UNSCALES, COMPUTE, ELEMENTS, True),
            )
        else:
            for start in range(done, tl.minimum(done + TILE, count), _NARROW):
                squares_of_weights += update_tile(
                    *(
                        addresses,
                        (start, few_offsets, few_offsets < count - start),
                        of_gradient,
                        of_weight,
                        coefficients,
                    ),
                    *(UPDATE, STATES, MASTER, AVERAGE, PENALTY, UNSCALES, COMPUTE, ELEMENTS, False),
                )

    if PENALTY == _GROUPS:
        # The program owns the whole group.  What its threads stored is visible to all of them after the barrier.
        tl.debug_barrier()
        norm = square_root(squares_of_weights)
        # Looked up here: kept through the loop, its place would take registers.
        bound = (lr * tl.load(places_of(settings_pointer).group_lasso) * square_root(group.to(tl.float64))).to(COMPUTE)
        shrunk = tl.where(norm <= bound, 0.0, 1 - divide(bound, norm))
        factor = tl.where(group > 0, shrunk, 1.0)  # parameters of one dimension have no groups
        for start in range(0, count, _NARROW):
            place = (start, few_offsets, few_offsets < count - start)
            w = load_weights(addresses, place, COMPUTE, ELEMENTS, MASTER, False)
            store_weights(w * factor, addresses, place, of_weight[3], COMPUTE, ELEMENTS, MASTER, AVERAGE, False)


@kernel
def optimizer_squares_kernel(
    table_pointer,
    partial_pointer,  # a sum for each program
    tensors: tl.int64,
    chunks: tl.int64,
    COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr,
    ELEMENT: tl.constexpr,
    TILE: tl.constexpr,
):
    offsets = tl.arange(0, TILE)
    squared = tl.zeros((TILE,), COMPUTE)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        tensor, start, count, _ = chunk_place(table_pointer, chunk, tensors, COLUMNS)
        address = operand_address(table_pointer, 1, tensors, tensor, start, ELEMENT)
        for done in range(0, count, TILE):
            place = (done, offsets, offsets < count - done)
            wide = ((address & 15) == 0) & (done + TILE <= count)
            if wide:
                g = load_operand(address, place, COMPUTE, ELEMENT, True)
            else:
                g = load_operand(address, place, COMPUTE, ELEMENT, False)
            squared += g * g
    tl.store(partial_pointer + tl.program_id(0), tl.sum(squared, axis=0).to(tl.float64))


# --- Configurations and launchers -----------------------------------------------------------------------------------


class Variant(NamedTuple):
    """What an update is compiled for: its algorithm, the dtypes of its operands, and what it does on the way."""

    algorithm: str
    parameter: torch.dtype
    gradient: torch.dtype
    state: torch.dtype
    penalty: Penalty = Penalty.NONE
    master: bool = False
    averaged: bool = False
    unscales: bool = False


@cache
def _update(variant: Variant) -> Configuration:
    name, parameter, gradient, state, penalty, master, averaged, unscales = variant
    row = ALGORITHMS[name]
    states = len(row.states)
    compute = torch.float64 if torch.float64 in (parameter, gradient, state) else torch.float32
    columns = [parameter, gradient, *[state] * states, *[compute] * (master + averaged)]
    types = " ".join(dict.fromkeys(TRITON_TYPE[dtype] for dtype in (parameter, gradient, *[state] * bool(states))))
    options = [*([f"penalty on {penalty.name.lower()}"] if penalty else []), *["master"] * master]
    options += [*["average"] * averaged, *["unscaling"] * unscales]
    threads = 2 * threads_for(compute)
    # A thread's 128-bit accesses to a tile, over the columns that it reads or writes.
    late = averaged and penalty is Penalty.GROUPS
    wide = [TILE * dtype.itemsize // 16 // threads for dtype in columns]
    return configure(
        optimizer_update_kernel,
        " + ".join([f"{name} {types}", *options]),
        torch.float64,
        {
            "COEFFICIENTS": row.coefficients,
            "UPDATE": row.update,
            "STATES": states,
            "MASTER": 2 + states if master else 0,
            "AVERAGE": len(columns) - 1 if averaged else 0,
            "PENALTY": int(penalty),
            "UNSCALES": unscales,
            "COMPUTE": COMPUTE[compute],
            "ELEMENTS": tuple(_ELEMENT[dtype] for dtype in columns),
            "COLUMNS": len(columns),
            "TILE": TILE,
        },
        pointers={"table": torch.int64},
        threads=threads,
        # The parameter isn't read where it has a master copy; the average waits for the penalty on groups.
        wide_loads=sum(wide) - wide[0] * master - wide[-1] * late,
        wide_stores=sum(wide) - wide[1] * (not unscales) - wide[-1] * late,
    )


@cache
def _squares(columns: int, gradient: torch.dtype) -> Configuration:
    threads = threads_for(gradient)
    return configure(
        optimizer_squares_kernel,
        f"gradient norm {TRITON_TYPE[gradient]} of {columns} columns",
        torch.float64,
        {"COLUMNS": columns, "COMPUTE": COMPUTE[gradient], "ELEMENT": _ELEMENT[gradient], "TILE": TILE},
        pointers={"table": torch.int64},
        threads=threads,
        wide_loads=TILE * gradient.itemsize // 16 // threads,
    )


_ELEMENT = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@ships("optimizer")
def configurations() -> Iterator[Configuration]:
    """Every algorithm in the types that models are mostly trained in; what our options add, where it matters."""
    for name in ALGORITHMS:
        for dtype in (torch.bfloat16, torch.float32):
            yield _update(Variant(name, dtype, dtype, dtype))
    for name in ("sgd_momentum", "adagrad", "adadelta", "rmsprop", "adam", "adamax", "nadam", "radam"):
        for dtype in (torch.float16, torch.float64):
            yield _update(Variant(name, dtype, dtype, dtype))
    for name in ("sgd_momentum", "adam"):
        yield _update(Variant(name, torch.float32, torch.float32, torch.float32, Penalty.ELEMENTS, averaged=True))
        yield _update(Variant(name, torch.float32, torch.float32, torch.float32, Penalty.GROUPS, averaged=True))
        yield _update(Variant(name, torch.bfloat16, torch.bfloat16, torch.float32, master=True))
        yield _update(Variant(name, torch.float32, torch.float32, torch.float32, unscales=True))
    for dtype in DTYPES:
        yield _squares(4, dtype)


def launch_update(
    variant: Variant,
    programs: int,
    words: Tensor,
    settings: Tensor,
    scalars: Tensor,
    averages: Tensor | None,
    squares: Tensor | None,
    tensors: int,
    lr: float,
    step: float,
    mu_product: float,
) -> None:
    """Update the tensors of a `Table` in place; operands as `optimizer_update_kernel` has them."""
    launch(
        _update(variant),
        programs,
        words,
        settings,
        scalars,
        settings if averages is None else averages,
        settings if squares is None else squares,
        tensors,
        0 if squares is None else squares.numel(),
        lr,
        step,
        mu_product,
    )


def launch_squares(words: Tensor, gradient: torch.dtype, columns: int, tensors: int, chunks: int) -> Tensor:
    """Float64 partial sums of the squares of the gradients in a `Table` of ``columns`` operands."""
    programs = min(SQUARES, chunks)
    partial = torch.empty(programs, dtype=torch.float64, device=words.device)
    launch(_squares(columns, gradient), programs, words, partial, tensors, chunks)
    return partial
