"""Optimizers: one kernel that updates many parameters, and a table of what each algorithm does to an element.

A program owns a chunk of one parameter.  It computes the algorithm's coefficients once, in float64, from numbers that
it reads or is given, so that nothing which changes from step to step is a constant of the kernel; then it reads weight,
gradient and state, and writes weight and state.  Clipping, penalties, averaging and master weights happen on the way.

Clipping by the gradients' norm needs it beforehand: `squares_kernel` leaves a fixed number of partial sums, which every
program of the update adds up in the same order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._triton import tl, triton
from .launch import COMPUTE, DTYPES, TRITON_TYPE, Configuration, launch, ships
from .multi_tensor import CHUNK, SETTINGS, FlatOperands, Table
from .numerics import divide, exp, expm1, log, narrow, scalar, square_root, widen
from .tiles import TILE, threads_for

__all__ = ["ALGORITHMS", "Algorithm", "Counters", "Operands", "Penalty", "Settings", "Update"]


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

# Their places in memory, for device code.
(
    _LR,
    _WEIGHT_DECAY,
    _DECOUPLED_WEIGHT_DECAY,
    _A,
    _B,
    _C,
    _EPS,
    _SIGN,
    _SCALE,
    _FOUND_INF,
    _CLIP_NORM,
    _CLIP_VALUE,
    _L1,
    _L2,
    _GROUP_LASSO,
    _AVERAGE_DECAY,
) = (tl.constexpr(place) for place in range(SETTINGS))
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

# --- Algorithms: coefficients of a step (float64 scalars), and the update of elements with them -----------------------


@triton.jit
def power(base, exponent):
    return exp(exponent * log(base))


@triton.jit
def bias_correction(beta, step):
    """1 - beta^step, without cancellation."""
    return -expm1(step * log(beta))


@triton.jit
def lerp(start, end, weight):
    """PyTorch's formula: exactly ``end`` for a weight of 1."""
    return tl.where(weight < 0.5, start + weight * (end - start), end - (end - start) * (1 - weight))


@triton.jit
def maximum(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sgd_coefficients(lr, momentum, dampening, c, eps, step, mu_product):
    # In its first step the buffer becomes the gradient.
    return lr, tl.where(step <= 1, 0.0, momentum), tl.where(step <= 1, 1.0, 1 - dampening), momentum


@triton.jit
def sgd(w, g, states, k):
    return w - k[0] * g, states


@triton.jit
def sgd_momentum(w, g, states, k):
    buffer = states[0] * k[1] + k[2] * g
    return w - k[0] * buffer, (buffer,)


@triton.jit
def sgd_nesterov(w, g, states, k):
    buffer = states[0] * k[1] + k[2] * g
    return w - k[0] * (g + k[3] * buffer), (buffer,)


@triton.jit
def adagrad_coefficients(lr, lr_decay, b, c, eps, step, mu_product):
    return lr / (1 + (step - 1) * lr_decay), eps


@triton.jit
def adagrad(w, g, states, k):
    total = states[0] + g * g
    return w - divide(k[0] * g, square_root(total) + k[1]), (total,)


@triton.jit
def adadelta_coefficients(lr, rho, b, c, eps, step, mu_product):
    return lr, rho, 1 - rho, eps


@triton.jit
def adadelta(w, g, states, k):
    square_avg, acc_delta = states
    square_avg = square_avg * k[1] + k[2] * g * g
    delta = divide(square_root(acc_delta + k[3]), square_root(square_avg + k[3])) * g
    acc_delta = acc_delta * k[1] + k[2] * delta * delta
    return w - k[0] * delta, (square_avg, acc_delta)


@triton.jit
def rmsprop_coefficients(lr, alpha, momentum, c, eps, step, mu_product):
    return lr, alpha, 1 - alpha, momentum, eps


@triton.jit
def rmsprop(w, g, states, k):
    square_avg = states[0] * k[1] + k[2] * g * g
    return w - divide(k[0] * g, square_root(square_avg) + k[4]), (square_avg,)


@triton.jit
def rmsprop_momentum(w, g, states, k):
    square_avg, buffer = states
    square_avg = square_avg * k[1] + k[2] * g * g
    buffer = buffer * k[3] + divide(g, square_root(square_avg) + k[4])
    return w - k[0] * buffer, (square_avg, buffer)


@triton.jit
def rmsprop_nesterov(w, g, states, k):
    square_avg, buffer = states
    square_avg = square_avg * k[1] + k[2] * g * g
    scaled = divide(g, square_root(square_avg) + k[4])
    buffer = buffer * k[3] + scaled
    return w - k[0] * (scaled + k[3] * buffer), (square_avg, buffer)


@triton.jit
def centered_parts(g, square_avg, grad_avg, k):
    """New averages of the gradient's square and of itself, and the gradient over its deviation."""
    square_avg = square_avg * k[1] + k[2] * g * g
    grad_avg = lerp(grad_avg, g, k[2])
    return square_avg, grad_avg, square_root(square_avg - grad_avg * grad_avg) + k[4]


@triton.jit
def rmsprop_centered(w, g, states, k):
    square_avg, grad_avg, deviation = centered_parts(g, states[0], states[1], k)
    return w - divide(k[0] * g, deviation), (square_avg, grad_avg)


@triton.jit
def rmsprop_centered_momentum(w, g, states, k):
    square_avg, grad_avg, deviation = centered_parts(g, states[0], states[1], k)
    buffer = states[2] * k[3] + divide(g, deviation)
    return w - k[0] * buffer, (square_avg, grad_avg, buffer)


@triton.jit
def rmsprop_centered_nesterov(w, g, states, k):
    square_avg, grad_avg, deviation = centered_parts(g, states[0], states[1], k)
    scaled = divide(g, deviation)
    buffer = states[2] * k[3] + scaled
    return w - k[0] * (scaled + k[3] * buffer), (square_avg, grad_avg, buffer)


@triton.jit
def adam_coefficients(lr, beta1, beta2, c, eps, step, mu_product):
    # lr / c1 m / (sqrt(v) / c2 + eps) = lr c2 / c1 m / (sqrt(v) + eps c2), with c2 the root of its correction.
    c2 = square_root(bias_correction(beta2, step))
    return lr * c2 / bias_correction(beta1, step), 1 - beta1, beta2, 1 - beta2, eps * c2


@triton.jit
def adam(w, g, states, k):
    exp_avg, exp_avg_sq = states
    exp_avg = lerp(exp_avg, g, k[1])
    exp_avg_sq = exp_avg_sq * k[2] + k[3] * g * g
    return w - divide(k[0] * exp_avg, square_root(exp_avg_sq) + k[4]), (exp_avg, exp_avg_sq)


@triton.jit
def adam_amsgrad(w, g, states, k):
    exp_avg, exp_avg_sq, max_exp_avg_sq = states
    exp_avg = lerp(exp_avg, g, k[1])
    exp_avg_sq = exp_avg_sq * k[2] + k[3] * g * g
    max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
    return w - divide(k[0] * exp_avg, square_root(max_exp_avg_sq) + k[4]), (exp_avg, exp_avg_sq, max_exp_avg_sq)


@triton.jit
def adamax_coefficients(lr, beta1, beta2, c, eps, step, mu_product):
    return lr / bias_correction(beta1, step), 1 - beta1, beta2, eps


@triton.jit
def adamax(w, g, states, k):
    exp_avg, exp_inf = states
    exp_avg = lerp(exp_avg, g, k[1])
    exp_inf = maximum(exp_inf * k[2], tl.abs(g) + k[3])
    return w - divide(k[0] * exp_avg, exp_inf), (exp_avg, exp_inf)


@triton.jit
def nadam_coefficients(lr, beta1, beta2, momentum_decay, eps, step, mu_product):
    base = tl.full((), 0.96, tl.float64)
    mu = beta1 * (1 - 0.5 * power(base, step * momentum_decay))
    mu_next = beta1 * (1 - 0.5 * power(base, (step + 1) * momentum_decay))
    c2 = square_root(bias_correction(beta2, step))
    of_gradient = lr * c2 * (1 - mu) / (1 - mu_product)
    of_average = lr * c2 * mu_next / (1 - mu_product * mu_next)
    return of_gradient, of_average, 1 - beta1, beta2, 1 - beta2, eps * c2


@triton.jit
def nadam(w, g, states, k):
    exp_avg, exp_avg_sq = states
    exp_avg = lerp(exp_avg, g, k[2])
    exp_avg_sq = exp_avg_sq * k[3] + k[4] * g * g
    return w - divide(k[0] * g + k[1] * exp_avg, square_root(exp_avg_sq) + k[5]), (exp_avg, exp_avg_sq)


@triton.jit
def radam_coefficients(lr, beta1, beta2, c, eps, step, mu_product):
    c2 = bias_correction(beta2, step)
    limit = 2 / (1 - beta2) - 1  # of the length of the simple moving average that the exponential one stands for
    length = limit - 2 * step * power(beta2, step) / c2
    rectified = length > 5
    rectifier = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
    factor = tl.where(rectified, square_root(tl.where(rectified, rectifier * c2, 1.0)), 1.0)
    return lr / bias_correction(beta1, step) * factor, 1 - beta1, beta2, 1 - beta2, eps, tl.where(rectified, 1.0, 0.0)


@triton.jit
def radam(w, g, states, k):
    exp_avg, exp_avg_sq = states
    exp_avg = lerp(exp_avg, g, k[1])
    exp_avg_sq = exp_avg_sq * k[2] + k[3] * g * g
    return w - divide(k[0] * exp_avg, tl.where(k[5] > 0, square_root(exp_avg_sq) + k[4], 1.0)), (exp_avg, exp_avg_sq)


@dataclass(frozen=True)
class Algorithm:
    """An optimizer's update: what the kernel needs to know.

    ``coefficients(lr, a, b, c, eps, step, mu_product)`` gives a tuple of float64 scalars, which ``update(w, g, states,
    coefficients)`` gets rounded to the type that it computes in; it returns the new weights and states.  ``states`` are
    their keys, as ``torch.optim`` calls them.
    """

    name: str
    coefficients: Any
    update: Any
    states: tuple[str, ...] = ()

    def budget(self, numel: int, dtype: torch.dtype) -> int:
        """Bytes that an update must move: gradient read, weight and state read and written."""
        return numel * dtype.itemsize * (3 + 2 * len(self.states))


#: Every update, by name.
ALGORITHMS: dict[str, Algorithm] = {
    row.name: row
    for row in (
        Algorithm("sgd", sgd_coefficients, sgd),
        Algorithm("sgd_momentum", sgd_coefficients, sgd_momentum, ("momentum_buffer",)),
        Algorithm("sgd_nesterov", sgd_coefficients, sgd_nesterov, ("momentum_buffer",)),
        Algorithm("adagrad", adagrad_coefficients, adagrad, ("sum",)),
        Algorithm("adadelta", adadelta_coefficients, adadelta, ("square_avg", "acc_delta")),
        Algorithm("rmsprop", rmsprop_coefficients, rmsprop, ("square_avg",)),
        Algorithm("rmsprop_momentum", rmsprop_coefficients, rmsprop_momentum, ("square_avg", "momentum_buffer")),
        Algorithm("rmsprop_nesterov", rmsprop_coefficients, rmsprop_nesterov, ("square_avg", "momentum_buffer")),
        Algorithm("rmsprop_centered", rmsprop_coefficients, rmsprop_centered, ("square_avg", "grad_avg")),
        Algorithm(
            "rmsprop_centered_momentum",
            rmsprop_coefficients,
            rmsprop_centered_momentum,
            ("square_avg", "grad_avg", "momentum_buffer"),
        ),
        Algorithm(
            "rmsprop_centered_nesterov",
            rmsprop_coefficients,
            rmsprop_centered_nesterov,
            ("square_avg", "grad_avg", "momentum_buffer"),
        ),
        Algorithm("adam", adam_coefficients, adam, ("exp_avg", "exp_avg_sq")),
        Algorithm("adam_amsgrad", adam_coefficients, adam_amsgrad, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")),
        Algorithm("adamax", adamax_coefficients, adamax, ("exp_avg", "exp_inf")),
        Algorithm("nadam", nadam_coefficients, nadam, ("exp_avg", "exp_avg_sq")),
        Algorithm("radam", radam_coefficients, radam, ("exp_avg", "exp_avg_sq")),
    )
}

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
def clip_coefficient(squares_pointer, squares, scale, clip_norm):
    """What ``clip_grad_norm_`` multiplies gradients by, from the partial sums of the scaled gradients' squares."""
    total = scalar(0.0, tl.float64)
    for start in range(0, squares, _SQUARES):
        place = start + tl.arange(0, _SQUARES)
        total += tl.sum(tl.load(squares_pointer + place, mask=place < squares, other=0), axis=0)
    coefficient = clip_norm / (square_root(total) / tl.abs(scale) + 1e-6)
    return tl.where(coefficient > 1, 1.0, coefficient)  # NaN stays


@triton.jit(do_not_specialize=["scalars_pointer", "averages_pointer", "squares_pointer", "tensors", "squares"])
def update_kernel(
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

    lr = scalar(lr, tl.float64) * tl.load(settings_pointer + _LR)
    coefficients = COEFFICIENTS(
        lr,
        tl.load(settings_pointer + _A),
        tl.load(settings_pointer + _B),
        tl.load(settings_pointer + _C),
        tl.load(settings_pointer + _EPS),
        scalar(step, tl.float64) + tl.load(scalars_pointer + tensor),
        scalar(mu_product, tl.float64) + tl.load(scalars_pointer + tensors + tensor),
    )
    scale = tl.load(settings_pointer + _SCALE)
    clip = clip_coefficient(squares_pointer, squares, scale, tl.load(settings_pointer + _CLIP_NORM))
    of_gradient_exactly = (
        tl.load(settings_pointer + _SIGN) * clip / scale,
        tl.load(settings_pointer + _CLIP_VALUE),
        tl.load(settings_pointer + _WEIGHT_DECAY),
        1 / scale,
    )
    average_share = lr
    if AVERAGE:
        average_decay = tl.load(settings_pointer + _AVERAGE_DECAY)
        averages = tl.load(averages_pointer + tensor)
        average_share = tl.where((average_decay < 0) | (averages <= 1), 1 / averages, 1 - average_decay)
    of_weight_exactly = (
        1 - lr * tl.load(settings_pointer + _DECOUPLED_WEIGHT_DECAY),
        lr * tl.load(settings_pointer + _L1),
        1 / (1 + lr * tl.load(settings_pointer + _L2)),
        average_share,
    )
    coefficients = [number.to(COMPUTE) for number in coefficients]
    of_gradient = [number.to(COMPUTE) for number in of_gradient_exactly]
    of_weight = [number.to(COMPUTE) for number in of_weight_exactly]

    count = tl.where(tl.load(settings_pointer + _FOUND_INF) != 0, 0, count)  # after an overflow: empty loops
    squares_of_weights = (lr * 0).to(COMPUTE)
    offsets = tl.arange(0, TILE)
    few_offsets = tl.arange(0, _NARROW)
    for done in range(0, count, TILE):
        if aligned & (done + TILE <= count):
            squares_of_weights += update_tile(
                addresses,
                (done, offsets, offsets < TILE),
                of_gradient,
                of_weight,
                coefficients,
                UPDATE,
                STATES,
                MASTER,
                AVERAGE,
                PENALTY,
                UNSCALES,
                COMPUTE,
                ELEMENTS,
                True,
            )
        else:
            for start in range(done, tl.minimum(done + TILE, count), _NARROW):
                squares_of_weights += update_tile(
                    addresses,
                    (start, few_offsets, few_offsets < count - start),
                    of_gradient,
                    of_weight,
                    coefficients,
                    UPDATE,
                    STATES,
                    MASTER,
                    AVERAGE,
                    PENALTY,
                    UNSCALES,
                    COMPUTE,
                    ELEMENTS,
                    False,
                )

    if PENALTY == _GROUPS:
        # The program owns the whole group.  What its threads stored is visible to all of them after the barrier.
        tl.debug_barrier()
        norm = square_root(squares_of_weights)
        bound = (lr * tl.load(settings_pointer + _GROUP_LASSO) * square_root(group.to(tl.float64))).to(COMPUTE)
        shrunk = tl.where(norm <= bound, 0.0, 1 - divide(bound, norm))
        factor = tl.where(group > 0, shrunk, 1.0)  # parameters of one dimension have no groups
        for start in range(0, count, _NARROW):
            place = (start, few_offsets, few_offsets < count - start)
            w = load_weights(addresses, place, COMPUTE, ELEMENTS, MASTER, False)
            store_weights(w * factor, addresses, place, of_weight[3], COMPUTE, ELEMENTS, MASTER, AVERAGE, False)


@triton.jit(do_not_specialize=["tensors", "chunks"])
def squares_kernel(
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


@cache
def _update(
    name: str,
    parameter: torch.dtype,
    gradient: torch.dtype,
    state: torch.dtype,
    penalty: Penalty = Penalty.NONE,
    master: bool = False,
    averaged: bool = False,
    unscales: bool = False,
) -> Configuration:
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
    return Configuration(
        label=" + ".join([f"{name} {types}", *options]),
        kernel=update_kernel,
        signature=(
            ("table_pointer", "*i64"),
            ("settings_pointer", "*fp64"),
            ("scalars_pointer", "*fp64"),
            ("averages_pointer", "*fp64"),
            ("squares_pointer", "*fp64"),
            ("tensors", "i64"),
            ("squares", "i32"),
            ("lr", "fp64"),
            ("step", "fp64"),
            ("mu_product", "fp64"),
        ),
        constants=(
            ("COEFFICIENTS", row.coefficients),
            ("UPDATE", row.update),
            ("STATES", states),
            ("MASTER", 2 + states if master else 0),
            ("AVERAGE", len(columns) - 1 if averaged else 0),
            ("PENALTY", int(penalty)),
            ("UNSCALES", unscales),
            ("COMPUTE", COMPUTE[compute]),
            ("ELEMENTS", tuple(_ELEMENT[dtype] for dtype in columns)),
            ("COLUMNS", len(columns)),
            ("TILE", TILE),
        ),
        threads=threads,
        # The parameter isn't read where it has a master copy; the average waits for the penalty on groups.
        wide_loads=sum(wide) - wide[0] * master - wide[-1] * late,
        wide_stores=sum(wide) - wide[1] * (not unscales) - wide[-1] * late,
    )


@cache
def _squares(columns: int, gradient: torch.dtype) -> Configuration:
    threads = threads_for(gradient)
    return Configuration(
        label=f"gradient norm {TRITON_TYPE[gradient]} of {columns} columns",
        kernel=squares_kernel,
        signature=(("table_pointer", "*i64"), ("partial_pointer", "*fp64"), ("tensors", "i64"), ("chunks", "i64")),
        constants=(
            ("COLUMNS", columns),
            ("COMPUTE", COMPUTE[gradient]),
            ("ELEMENT", _ELEMENT[gradient]),
            ("TILE", TILE),
        ),
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
            yield _update(name, dtype, dtype, dtype)
    for name in ("sgd_momentum", "adagrad", "adadelta", "rmsprop", "adam", "adamax", "nadam", "radam"):
        for dtype in (torch.float16, torch.float64):
            yield _update(name, dtype, dtype, dtype)
    for name in ("sgd_momentum", "adam"):
        yield _update(name, torch.float32, torch.float32, torch.float32, Penalty.ELEMENTS, averaged=True)
        yield _update(name, torch.float32, torch.float32, torch.float32, Penalty.GROUPS, averaged=True)
        yield _update(name, torch.bfloat16, torch.bfloat16, torch.float32, master=True)
        yield _update(name, torch.float32, torch.float32, torch.float32, unscales=True)
    for dtype in DTYPES:
        yield _squares(4, dtype)


@dataclass
class Operands:
    """What one launch works on, a list for each column: all tensors of a list have one dtype, all lists one device."""

    parameters: Sequence[Tensor]
    gradients: Sequence[Tensor]
    states: Sequence[Sequence[Tensor]] = ()
    masters: Sequence[Tensor] | None = None
    averages: Sequence[Tensor] | None = None
    unscales: bool = False  # whether gradients are left divided by their scale

    def written(self) -> list[Tensor]:
        return [tensor for column in self._columns() if self.writes(column) for tensor in column]

    def writes(self, column: Sequence[Tensor]) -> bool:
        return self.unscales or column is not self.gradients

    def _columns(self) -> Iterator[Sequence[Tensor]]:
        yield self.parameters
        yield self.gradients
        yield from self.states
        if self.masters is not None:
            yield self.masters
        if self.averages is not None:
            yield self.averages


class Counters(NamedTuple):
    """A number for each parameter: how many steps it has taken, this one included, and NAdam's product.

    Numbers that only the device knows are float64 tensors.
    """

    step: Sequence[float] | Tensor
    mu_product: Sequence[float] | Tensor | None = None


class Update:
    """One launch, with its tensors laid out and its table uploaded."""

    def __init__(
        self,
        name: str,
        operands: Operands,
        settings: Settings,
        counters: Counters,
        penalty: Penalty,
        table: Table,
    ) -> None:
        self._operands = operands
        self._settings = settings
        first = operands.parameters[0]
        self._tensors = len(operands.parameters)
        states = [column[0].dtype for column in operands.states]
        self.configuration = _update(
            name,
            first.dtype,
            operands.gradients[0].dtype,
            states[0] if states else first.dtype,
            penalty,
            operands.masters is not None,
            operands.averages is not None,
            operands.unscales,
        )
        self._flat = FlatOperands(operands.parameters, rows=penalty is Penalty.GROUPS)
        self._bases, scalars, self._device_scalars = _relative(counters, self._tensors)
        columns = [self._flat.addresses(column, written=operands.writes(column)) for column in operands._columns()]
        elements, chunks, groups = _extents(operands.parameters, penalty)
        programs = table.programs(elements, chunks)
        rows = [np.array(settings).view(np.int64), *columns, elements, chunks, groups, *scalars, programs]
        self._words = table.upload(rows)
        self._columns = len(columns)
        self._programs = len(programs)

    def squares(self) -> Tensor:
        """Launch the sum of the gradients' squares: float64 partial sums."""
        programs = min(SQUARES, self._programs)
        partial = torch.empty(programs, dtype=torch.float64, device=self._words.device)
        configuration = _squares(self._columns, self._operands.gradients[0].dtype)
        launch(configuration, programs, self._words, partial, self._tensors, self._programs)
        return partial

    def run(self, lr: float, on_device: dict[str, Tensor], averages: Tensor | None, squares: Tensor | None) -> None:
        """Launch the update.  ``on_device`` are `Settings` that only the device knows, by name."""
        words = self._words.view(torch.float64)
        settings = words[:SETTINGS]
        if on_device:
            settings = settings.clone()
            for name, value in on_device.items():
                settings[Settings._fields.index(name)].copy_(value.reshape(()), non_blocking=True)
        scalars = self._device_scalars
        if scalars is None:
            scalars = words[SETTINGS + (self._columns + 3) * self._tensors :]
        launch(
            self.configuration,
            self._programs,
            self._words,
            settings,
            scalars,
            settings if averages is None else averages,
            settings if squares is None else squares,
            self._tensors,
            0 if squares is None else squares.numel(),
            lr,
            *self._bases,
        )
        self._flat.copy_back()
        torch.autograd.graph.increment_version(self._operands.written())


def _extents(parameters: Sequence[Tensor], penalty: Penalty) -> list[Any]:
    """Elements of each parameter, how many a program takes, and how many a group has (0 where there are no groups)."""
    elements = np.array([parameter.numel() for parameter in parameters], dtype=np.int64)
    chunks = np.full_like(elements, CHUNK)
    groups = np.zeros_like(elements)
    if penalty is Penalty.GROUPS:
        for i, parameter in enumerate(parameters):
            if parameter.dim() > 1 and parameter.numel():
                chunks[i] = groups[i] = parameter.numel() // parameter.shape[0]
    return [elements, chunks, groups]


def _relative(counters: Counters, tensors: int) -> tuple[tuple[float, float], list[Any], Tensor | None]:
    """Counters as numbers for the launch, what each tensor's differ by from them, and those on the device."""
    step, product = counters.step, counters.mu_product
    zeros = np.zeros(tensors)
    if isinstance(step, Tensor):
        on_device = torch.stack([step, product if isinstance(product, Tensor) else torch.ones_like(step)])
        return (0.0, 0.0), [zeros.view(np.int64)] * 2, on_device
    steps, products = np.array(step, dtype=np.float64), zeros if product is None else np.array(product)
    differences = [(steps - steps[0]).view(np.int64), (products - products[0]).view(np.int64)]
    return (float(steps[0]), float(products[0])), differences, None
