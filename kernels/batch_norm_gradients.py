"""Batch norm's gradients, in two passes: sums over each channel, then the input's gradient, which needs them.

The programs of the second add up what those of the first left; the sums are the parameters' gradients.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from .base._triton import tl, triton
from .base.channels import (
    Plan,
    Tiling,
    channel_tile,
    common_tilings_of,
    lanes,
    launch_over,
    plan_of,
    program_place,
    tile_place,
    tilings_of,
)
from .base.launch import ACCUMULATOR, DTYPES, Configuration, kernel, ships
from .base.layout import dense, dense_like
from .base.numerics import narrow, precise_sum, scalar
from .base.tiles import aligned, load, load_bits, store
from .batch_norm import (
    AFFINE,
    before_told,
    channel_slopes,
    configuration_of,
    noise_tile,
    normalisation,
    spatial_constants,
)
from .batch_norm_operands import Around, Norm, as_type, plan_behind, takes_halves
from .batch_norm_pool import shared_gradient
from .batch_norm_statistics import before_constants, channel_shift, value_before
from .functions.activation import (
    ACTIVATIONS,
    IDENTITY,
    PRELU,
    Activation,
    gradient_from_input,
    prelu_slope_gradient,
)

__all__ = ["batch_norm_backward", "batch_norm_reduce"]

# --- Kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def channel_sums(
    partial_pointer,
    splits,
    channel,
    channels,
    SUMS: tl.constexpr,
    TILING: tl.constexpr,
):
    """The first two of the ``SUMS`` sums of each channel, from what programs of this geometry left."""
    split = lanes(TILING)
    inside = (split < splits) & (channel < channels)
    partial_pointer += split.to(tl.int64) * SUMS * channels + channel
    first = tl.load(partial_pointer, mask=inside, other=0)
    second = tl.load(partial_pointer + channels, mask=inside, other=0)
    return precise_sum(first, TILING.axis), precise_sum(second, TILING.axis)


@kernel
def batch_norm_reduce_kernel(
    g_pointer,  # gradient of the output, as x, or of the means over ``places``, (samples, channels)
    x_pointer,  # input, (outer, channels, inner)
    residual_pointer,  # what was added before the activation, as x; or None
    mask_pointer,  # the packed bits that the forward pass left; or None
    dz_pointer,  # gradient of the activation's input, as x; or None where the next pass computes it again
    partial_pointer,  # (splits, 2 or 3, channels): sums of dz and of dz * normalised x
    mean_pointer,  # (channels,)
    variance_pointer,
    weight_pointer,  # (channels,), or None
    bias_pointer,
    slope_pointer,  # PReLU's slopes, (slopes,), whose gradient's sums then are a third; or None
    seed_pointer,  # one int64, where dropout followed; or None
    shift_pointer,  # (channels,), added before the activation before the norm; or None
    outer: tl.int64,
    channels,
    columns,
    channel_blocks: tl.int64,
    tracks: tl.int64,
    tiles_per_track: tl.int64,
    tiles_per_program: tl.int64,
    along_inner: tl.int32,
    eps: tl.float64,
    a: tl.float64,
    b: tl.float64,
    slopes,  # one, or one for each channel; or None
    last,  # the last random number that is kept; or None
    spatial,  # the elements of a sample's channel, if dropout drops them together; or None
    places,  # of a sample's channel, whose mean the gradient is of; or None
    before_a: tl.float64,  # of the activation before the norm
    before_b: tl.float64,
    BEFORE: tl.constexpr,  # that activation; or None
    ACTIVATION: tl.constexpr,
    TILING: tl.constexpr,
    COMPUTE: tl.constexpr,
    STAGES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    columns = aligned(columns, ALIGN)
    channel_block, track, first, end, split = program_place(channel_blocks, tracks, tiles_per_track, tiles_per_program)
    channel = channel_tile(channel_block, TILING)
    mean, inverse_deviation, scale, bias = normalisation(
        mean_pointer, variance_pointer, weight_pointer, bias_pointer, channel, channels, eps, COMPUTE
    )
    a = channel_slopes(slope_pointer, scalar(a, COMPUTE), channel, channels, slopes, COMPUTE)
    b = scalar(b, COMPUTE)
    shift = channel_shift(shift_pointer, channel, channels, COMPUTE)
    sums = tl.full(TILING.shape, 0.0, COMPUTE)
    products = tl.full(TILING.shape, 0.0, COMPUTE)
    rows: tl.constexpr = 2 if slope_pointer is None else 3
    if slope_pointer is not None:
        slope_sums = tl.full(TILING.shape, 0.0, COMPUTE)
    for step in tl.range(first, end, num_stages=STAGES):
        tile, present = tile_place(step, channel_block, track, outer, channels, columns, along_inner, TILING)
        if places is None:
            dz = load(g_pointer, tile, COMPUTE)
        else:
            dz = shared_gradient(
                *(g_pointer, None, tile, step, track, channel, channels, places, along_inner),
                *(COMPUTE, TILING),
            )
        if seed_pointer is not None:
            dz *= noise_tile(
                *(seed_pointer, last, spatial, step, channel_block, track, channel_blocks, tracks, channels),
                *(along_inner, x_pointer.dtype.element_ty, COMPUTE, TILING),
            )
        x = value_before(load(x_pointer, tile, COMPUTE), shift, before_a, before_b, BEFORE)
        centred = x - mean
        if mask_pointer is not None:
            tile_index = (step * channel_blocks + channel_block) * tracks + track
            kept = tl.reshape(load_bits(mask_pointer, tile_index, 1, TILING.height * TILING.width), TILING.shape)
            dz = ACTIVATION.gradient(dz, kept, a, b)
        else:
            z = centred * scale + bias
            if residual_pointer is not None:
                z += load(residual_pointer, tile, COMPUTE)
            if slope_pointer is not None:
                slope_sums += tl.where(present, prelu_slope_gradient(dz, z), 0.0)
            dz = gradient_from_input(dz, z, a, b, ACTIVATION)
        if dz_pointer is not None:
            store(dz_pointer, tile, dz)
        dz = tl.where(present, dz, 0.0)
        sums += dz
        products += dz * centred

    target = partial_pointer + split * rows * channels + channel
    mask = channel < channels
    tl.store(target, precise_sum(sums, TILING.axis), mask=mask)
    tl.store(target + channels, precise_sum(products, TILING.axis) * inverse_deviation, mask=mask)
    if slope_pointer is not None:
        tl.store(target + 2 * channels, precise_sum(slope_sums, TILING.axis), mask=mask)


@kernel
def batch_norm_backward_kernel(
    g_pointer,  # gradient of the output, as x, or of what was reduced over ``places``, (samples, channels)
    x_pointer,  # input, (outer, channels, inner)
    dx_pointer,  # gradient of the input, as x
    partial_pointer,  # (splits, 2, channels) of sums of dz and of dz * normalised x; or None: constant statistics
    mean_pointer,  # (channels,)
    variance_pointer,
    weight_pointer,  # (channels,), or None
    bias_pointer,
    dweight_pointer,  # their gradients; or None
    dbias_pointer,
    slope_pointer,  # PReLU's slopes, (slopes,), which take the place of ``a``; or None
    seed_pointer,  # one int64, where dropout followed; or None
    shift_pointer,  # (channels,), added before the activation before the norm; or None
    position_pointer,  # places of maxima, (samples, channels), whose gradient it then is; or None
    dshift_pointer,  # (splits, channels): sums of its gradient; or None
    outer: tl.int64,
    channels,
    columns,
    channel_blocks: tl.int64,
    tracks: tl.int64,
    tiles_per_track: tl.int64,
    tiles_per_program: tl.int64,
    along_inner: tl.int32,
    splits: tl.int64,
    inverse_count: tl.float64,  # 1 / the number of values that the sums are over
    eps: tl.float64,
    a: tl.float64,
    b: tl.float64,
    slopes,  # one, or one for each channel; or None
    last,  # the last random number that is kept; or None
    spatial,  # the elements of a sample's channel, if dropout drops them together; or None
    places,  # of a sample's channel, over which was reduced; or None
    before_a: tl.float64,  # of the activation before the norm
    before_b: tl.float64,
    BEFORE: tl.constexpr,  # that activation; or None
    ACTIVATION: tl.constexpr,
    TILING: tl.constexpr,
    COMPUTE: tl.constexpr,
    PLAN: tl.constexpr,  # the tile of the plan, of which this one may be half
    STAGES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    columns = aligned(columns, ALIGN)
    channel_block, track, first, end, split = program_place(channel_blocks, tracks, tiles_per_track, tiles_per_program)
    channel = channel_tile(channel_block, TILING)
    mean, inverse_deviation, scale, bias = normalisation(
        mean_pointer, variance_pointer, weight_pointer, bias_pointer, channel, channels, eps, COMPUTE
    )
    if partial_pointer is not None:
        rows: tl.constexpr = 2 if slope_pointer is None else 3
        dbias, dweight = channel_sums(partial_pointer, splits, channel, channels, rows, PLAN)
        if dweight_pointer is not None:  # noqa: SIM102  # which is known when it is compiled
            if split == 0:
                element: tl.constexpr = dweight_pointer.dtype.element_ty
                tl.store(dweight_pointer + channel, narrow(dweight, element), mask=channel < channels)
                tl.store(dbias_pointer + channel, narrow(dbias, element), mask=channel < channels)
        share = scalar(inverse_count, COMPUTE)
        mean_dz = dbias * share
        slope = dweight * share * inverse_deviation
    a = channel_slopes(slope_pointer, scalar(a, COMPUTE), channel, channels, slopes, COMPUTE)
    b = scalar(b, COMPUTE)
    shift = channel_shift(shift_pointer, channel, channels, COMPUTE)
    if dshift_pointer is not None:
        shift_sums = tl.full(TILING.shape, 0.0, COMPUTE)
    for ahead in tl.range(first, end, num_stages=STAGES):
        step = first + end - 1 - ahead  # backward
        tile, present = tile_place(step, channel_block, track, outer, channels, columns, along_inner, TILING)
        if places is None:
            dx = load(g_pointer, tile, COMPUTE)
        else:
            dx = shared_gradient(
                *(g_pointer, position_pointer, tile, step, track, channel, channels, places, along_inner),
                *(COMPUTE, TILING),
            )
        if seed_pointer is not None:
            dx *= noise_tile(
                *(seed_pointer, last, spatial, step, channel_block, track, channel_blocks, tracks, channels),
                *(along_inner, x_pointer.dtype.element_ty, COMPUTE, TILING),
            )
        if ACTIVATION.saves != "nothing" or partial_pointer is not None or BEFORE is not None:
            x = load(x_pointer, tile, COMPUTE)
            centred = value_before(x, shift, before_a, before_b, BEFORE) - mean
            dx = gradient_from_input(dx, centred * scale + bias, a, b, ACTIVATION)
            if partial_pointer is not None:
                dx = dx - mean_dz - centred * slope
        dx = dx * scale
        if BEFORE is not None:
            dx = gradient_from_input(dx, x + shift, scalar(before_a, COMPUTE), scalar(before_b, COMPUTE), BEFORE)
        store(dx_pointer, tile, dx)
        if dshift_pointer is not None:
            shift_sums += tl.where(present, dx, 0.0)
    if dshift_pointer is not None:
        tl.store(
            dshift_pointer + split * channels + channel, precise_sum(shift_sums, TILING.axis), mask=channel < channels
        )


# --- Configurations ---------------------------------------------------------------------------------------------------

# The pointers of each kernel that may be None.
_GRADIENTS = frozenset({"dweight", "dbias"})
_REDUCED = AFFINE | {"residual", "mask", "dz", "slope", "seed", "shift"}
_TRAINING = AFFINE | _GRADIENTS | {"partial"}
_OPTIONAL = _TRAINING | {"slope", "seed", "position", "shift", "dshift"}


@cache
def _reduce(
    dtype: torch.dtype,
    tiling: Tiling,
    row: Activation,
    given: frozenset[str],
    parameters: torch.dtype | None = None,
    normalised: bool = True,
    shared: bool = False,
    before: Activation | None = None,
    of_channels: bool = False,
) -> Configuration:
    """``given`` are the pointers that aren't None, of those that may be; ``shared``: the gradient is that of means."""
    residual, mask, noise = ("residual" in given, "mask" in given, "seed" in given)
    tells = {"+ residual": residual, "+ mask": mask, f"+ dropout{' of channels' * of_channels}": noise}
    return configuration_of(
        batch_norm_reduce_kernel,
        "reduce",
        *(dtype, parameters or ACCUMULATOR[dtype], tiling, row),
        {name: name in given for name in sorted(_REDUCED)},
        {
            **tells,
            "without statistics": not normalised,
            "of all places": shared,
            "+ emits": emits_alone(given),
            **before_told(before, given),
        },
        wide_loads=2 + residual - shared,
        wide_stores=int("dz" in given),
        constants=_missing(normalised, shared)
        | before_constants(before, "shift" in given)
        | spatial_constants(of_channels),
    )


def emits_alone(given: frozenset[str]) -> bool:
    """Whether the gradient before the activation is wanted, which could be computed from the input."""
    return "dz" in given and given.isdisjoint({"residual", "mask"})


def _missing(normalised: bool, shared: bool) -> dict[str, None]:
    """The arguments that are None where the input isn't normalised, or the gradient not shared."""
    statistics = () if normalised else ("mean_pointer", "variance_pointer")
    return dict.fromkeys((*statistics, *(() if shared else ("places",))))


@cache
def _gradient(
    dtype: torch.dtype,
    tiling: Tiling,
    row: Activation,
    given: frozenset[str],
    parameters: torch.dtype | None = None,
    normalised: bool = True,
    shared: bool = False,
    before: Activation | None = None,
    of_channels: bool = False,
) -> Configuration:
    """``given`` are the pointers that aren't None, of those that may be; ``shared`` is the gradient of a reduction."""
    training = "partial" in given
    reads = training or row is not IDENTITY.row
    return configuration_of(
        batch_norm_backward_kernel,
        "backward",
        *(dtype, parameters or ACCUMULATOR[dtype], tiling, row),
        {name: name in given for name in sorted(_OPTIONAL)},
        {
            "evaluation": not training,
            "of the input alone": training and given >= AFFINE and not given >= _GRADIENTS,
            f"+ dropout{' of channels' * of_channels}": "seed" in given,
            "without statistics": not normalised,
            "of maxima": "position" in given,
            "of means": shared and "position" not in given,
            **before_told(before, given),
        },
        wide_loads=1 + reads - shared,
        wide_stores=1,
        constants=_missing(normalised, shared)
        | before_constants(before, "shift" in given)
        | spatial_constants(of_channels)
        | {"PLAN": tiling.whole}
        # Copies of positions, 8 bytes an element, wouldn't fit into the shared memory of sm_86, sm_89 and sm_120.
        | ({"STAGES": 1} if "position" in given else {}),
    )


@ships("batch_norm")
def configurations() -> Iterator[Configuration]:
    usual = dict.fromkeys(_usual_configurations())
    yield from usual
    yield from (replace(other, rare=True) for other in dict.fromkeys(_other_configurations()) if other not in usual)


def _usual_configurations() -> Iterator[Configuration]:
    bfloat16 = torch.bfloat16
    for tiling in tilings_of(bfloat16):
        yield from _plain(bfloat16, tiling)
    for dtype in (torch.float32, torch.float64):
        for tiling in common_tilings_of(dtype):
            yield from _plain(dtype, tiling)
    for tiling in common_tilings_of(bfloat16):
        yield from _fused(bfloat16, tiling, ACTIVATIONS["relu"])
        yield _reduce(bfloat16, tiling, PRELU.row, AFFINE | {"slope"})
        yield _gradient(bfloat16, tiling, PRELU.row, _TRAINING | {"slope"})
        for of_channels in (False, True):
            yield _reduce(bfloat16, tiling, ACTIVATIONS["relu"], AFFINE | {"seed"}, of_channels=of_channels)
            yield _gradient(bfloat16, tiling, ACTIVATIONS["relu"], _TRAINING | {"seed"}, of_channels=of_channels)
        yield from _of_all_places(bfloat16, tiling, ACTIVATIONS["relu"])
    _, rows = common_tilings_of(bfloat16)
    yield from _plain(torch.float16, rows)
    yield from _plain(bfloat16, rows, bfloat16)
    yield _gradient(bfloat16, rows, IDENTITY.row, AFFINE)
    for tiling in common_tilings_of(bfloat16):
        yield from _behind(bfloat16, tiling, ACTIVATIONS["relu"])
    for name in ("gelu", "tanh"):
        yield _reduce(torch.float32, rows, ACTIVATIONS[name], AFFINE)


def _other_configurations() -> Iterator[Configuration]:
    for dtype in DTYPES:
        for tiling in tilings_of(dtype):
            yield from _plain(dtype, tiling)
        for tiling in common_tilings_of(dtype):
            yield from _fused(dtype, tiling, ACTIVATIONS["relu"])
            yield from _plain(dtype, tiling, dtype)
            yield from _of_all_places(dtype, tiling, ACTIVATIONS["silu"])
            yield _reduce(dtype, tiling, IDENTITY.row, frozenset())
            for given in (AFFINE, frozenset({"partial"}), AFFINE | {"partial"}):
                yield _gradient(dtype, tiling, IDENTITY.row, given)
    for row in ACTIVATIONS.values():
        yield from _fused(torch.float32, common_tilings_of(torch.float32)[1], row)
        yield from _behind(torch.float32, common_tilings_of(torch.float32)[0], row)


def _plain(dtype: torch.dtype, tiling: Tiling, parameters: torch.dtype | None = None) -> Iterator[Configuration]:
    """Training without an activation."""
    yield _reduce(dtype, tiling, IDENTITY.row, AFFINE, parameters)
    yield _gradient(dtype, tiling, IDENTITY.row, _TRAINING, parameters)


def _fused(dtype: torch.dtype, tiling: Tiling, row: Activation) -> Iterator[Configuration]:
    """Training with an activation, alone and after a residual."""
    yield _reduce(dtype, tiling, row, AFFINE)
    yield _gradient(dtype, tiling, row, _TRAINING)
    yield _reduce(dtype, tiling, row, AFFINE | {"dz", "mask" if row.saves == "mask" else "residual"})


def _behind(dtype: torch.dtype, tiling: Tiling, before: Activation) -> Iterator[Configuration]:
    """Training behind an activation of sums."""
    tiling = tiling.halved if takes_halves(dtype, before) else tiling
    yield _reduce(dtype, tiling, IDENTITY.row, AFFINE | {"shift"}, before=before)
    yield _gradient(dtype, tiling, IDENTITY.row, _TRAINING | {"shift", "dshift"}, before=before)


def _of_all_places(dtype: torch.dtype, tiling: Tiling, row: Activation) -> Iterator[Configuration]:
    """Behind a reduction over all places: a maximum's and a mean's, and both without statistics."""
    halved = tiling.halved if row.saves == "input" else tiling
    yield _reduce(dtype, halved, row, AFFINE, shared=True)
    yield _gradient(dtype, halved, row, AFFINE | {"partial"}, shared=True)
    yield _gradient(dtype, tiling, IDENTITY.row, AFFINE | {"partial", "position"}, shared=True)
    yield _gradient(dtype, tiling, IDENTITY.row, frozenset({"position"}), normalised=False, shared=True)
    yield _reduce(dtype, halved, row, frozenset({"bias", "dz"}), dtype, normalised=False, shared=True)


# --- Launchers --------------------------------------------------------------------------------------------------------


def _plan(x: Tensor, around: Around, places: int | None) -> Plan:
    """The programs of both kernels; a gradient that places share takes registers for each element's sample, too."""
    plan = plan_behind(x.dtype, plan_of(x, places or around.spatial(x)), around.before)
    return plan.halved if places is not None and around.activation.row.saves == "input" else plan


def batch_norm_reduce(
    g: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    norm: Norm,
    around: Around,
    *,
    places: int | None = None,
    emits: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Sums of dz, the gradient before the activation, and of dz * normalised x: of parts of each channel.

    They are (splits, 2, channels); with PReLU's slopes those of their gradient are a third.  With a residual or the
    mask, whose activation's input can't be computed from ``x`` alone, or where it ``emits`` it, also dz itself.

    With the number of ``places`` of a sample's channel, ``g`` is the gradient of their mean, (samples, channels).
    """
    x = dense(x)
    dz = torch.empty_like(x) if emits or residual is not None or mask is not None else None
    sums = 2 if around.slopes is None else 3
    if not x.numel():
        return torch.zeros((1, sums, x.shape[1]), dtype=ACCUMULATOR[x.dtype], device=x.device), dz
    plan = _plan(x, around, places)
    partial = torch.empty((plan.splits, sums, plan.channels), dtype=ACCUMULATOR[x.dtype], device=x.device)
    parameters = norm.parameter_type(x.dtype)
    pointers = {
        "g": dense_like(g, x.stride()) if places is None else g.contiguous(),
        "x": x,
        "residual": None if residual is None else dense_like(residual, x.stride()),
        "mask": mask,
        "dz": dz,
        "partial": partial,
        **norm.vectors(x.dtype, parameters),
        **around.pointers,
    }
    given = frozenset(name for name in _REDUCED if pointers[name] is not None)
    kind = (parameters, norm.mean is not None, places is not None, around.row_before, around.of_channels)
    configuration = _reduce(x.dtype, plan.tiling, around.activation.row, given, *kind)
    launch_over(configuration, plan, tuple(pointers.values()), norm.eps, *around.scalars(x, places))
    return partial, dz


def batch_norm_backward(
    g: Tensor,
    x: Tensor,
    partial: Tensor | None,
    inverse_count: float,
    norm: Norm,
    around: Around,
    *,
    affine: bool,
    places: int | None = None,
    position: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradient of the input and, where ``affine``, of weight and bias, in the type of the weight.

    ``partial`` are the sums of `batch_norm_reduce`, and ``inverse_count`` is 1 / the number of values that they are
    over.  None where the statistics don't depend on ``x``.  ``places`` as of `batch_norm_reduce`; with the ``position``
    of maxima over these, the gradient is theirs.  Where a shift comes before the norm, the last result are partial sums
    of its gradient, (splits, channels).
    """
    x = dense(x)
    dx = torch.empty_like(x)
    weight = norm.weight
    if not x.numel():
        nothing = (None, None) if weight is None or not affine else (torch.zeros_like(weight), torch.zeros_like(weight))
        return dx, *nothing, None
    plan = _plan(x, around, places)
    if partial is not None and partial.shape[0] > plan.tiling.lanes:
        partial = partial.sum(0, keepdim=True)
    parameters = norm.parameter_type(x.dtype)
    dweight, dbias = (
        torch.empty(plan.channels, dtype=parameters, device=x.device) if affine else None for _ in range(2)
    )
    sums = (plan.splits, plan.channels)
    shifted = around.before is not None and around.before.shift is not None
    dshift = torch.empty(sums, dtype=ACCUMULATOR[x.dtype], device=x.device) if shifted else None
    pointers = {
        "g": dense_like(g, x.stride()) if places is None else g.contiguous(),
        "x": x,
        "dx": dx,
        "partial": partial,
        **norm.vectors(x.dtype, parameters),
        "dweight": dweight,
        "dbias": dbias,
        **around.pointers,
        "position": position,
        "dshift": dshift,
    }
    splits = 0 if partial is None else partial.shape[0]
    given = frozenset(name for name in _OPTIONAL if pointers[name] is not None)
    kind = (parameters, norm.mean is not None, places is not None, around.row_before, around.of_channels)
    configuration = _gradient(x.dtype, plan.tiling, around.activation.row, given, *kind)
    scalars = (splits, inverse_count, norm.eps, *around.scalars(x, places))
    launch_over(configuration, plan, tuple(pointers.values()), *scalars)
    return dx, *as_type(parameters if weight is None else weight.dtype, dweight, dbias), dshift
