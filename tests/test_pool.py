"""Max pooling against PyTorch's: values, gradients, indices, NaN, ties, memory formats, codes, bytes."""

import copy
import inspect
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.device import FLOAT_DTYPES, KERNELS_RUN, ON_GPU
from support.gpu import check_capture
from support.launches import launches
from torch import Tensor, nn

import fusednn
from fusednn import autograd, kernels, layers
from fusednn.autograd.dispatch import Choice, observe_choices
from fusednn.catalogue import row_of
from fusednn.instruments.saved_tensors import saved_tensors
from fusednn.kernels import pool_window
from fusednn.testing import ARRANGEMENTS, LAYOUTS, assert_same_bits, check_against_stock, leaf, random_tensor

if kernels.INTERPRETING:
    from fusednn.instruments.traffic import measure_traffic

Options = dict[str, Any]

# The first are quick to run, and between them take every kernel.
WINDOWS: list[Options] = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2, "padding": (1, 0), "ceil_mode": True},
    {"kernel_size": (3, 2), "stride": (1, 3), "padding": (1, 0), "dilation": (2, 1)},
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2, "ceil_mode": True},
    {"kernel_size": 2, "padding": 1},
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 1},
    {"kernel_size": (5, 4), "stride": (4, 5), "padding": 2, "dilation": (1, 2), "ceil_mode": True},
]
every_window = pytest.mark.parametrize(
    "window", [*WINDOWS[:3], *(pytest.param(window, marks=pytest.mark.thorough) for window in WINDOWS[3:])], ids=str
)
needs_kernels = pytest.mark.kernels
counts_bytes = pytest.mark.interpreter


def pooling(function: Callable[..., Any], window: Options) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x, **window)


def check(x: Tensor, window: Options, ours: Callable[..., Any] = autograd.max_pool2d, *, indices: bool = False) -> None:
    stock = getattr(F, ours.__name__)
    gradient = random_tensor(tuple(stock(x, **window).shape), x.dtype, x.device.type, seed=1)
    check_against_stock(pooling(ours, window), pooling(stock, window), [x], gradient)
    y, *mine = ours(x, **window, return_indices=True) if indices else (ours(x, **window),)
    if x.dim() == 4:
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    if indices:
        assert_same_bits(mine[0], stock(x, **window, return_indices=True)[1], "indices")


@needs_kernels
@every_window
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.smoke
def test_values_gradients_and_indices(window: Options, layout: str, device: str) -> None:
    check(LAYOUTS[layout](random_tensor((2, 3, 11, 10), torch.float32, device)), window, indices=True)


@needs_kernels
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("window", [WINDOWS[0], pytest.param(WINDOWS[1], marks=pytest.mark.thorough)], ids=str)
@pytest.mark.parametrize("layout", [pytest.param("contiguous", marks=pytest.mark.thorough), "channels_last"])
def test_dtypes(layout: str, window: Options, dtype: torch.dtype, device: str) -> None:
    check(LAYOUTS[layout](random_tensor((1, 35, 6, 5), dtype, device)), window)


@needs_kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 2, 3, 67), pytest.param((1, 1, 3, 3), marks=pytest.mark.thorough)], ids=str)
def test_tails(shape: tuple[int, ...], layout: str, device: str) -> None:
    check(LAYOUTS[layout](random_tensor(shape, torch.float32, device)), WINDOWS[0])


@needs_kernels
@every_window
@pytest.mark.parametrize("layout", ["contiguous", pytest.param("channels_last", marks=pytest.mark.thorough)])
def test_ties_nan_and_infinities(window: Options, layout: str, device: str) -> None:
    """The first of equal maxima wins, and the last NaN; a window of negative infinities has its first element."""
    x = random_tensor((2, 2, 8, 9), torch.float32, device).div(3).round()
    x[0, 0] = -float("inf")
    x[:, 1][x[:, 1] > 0] = float("nan")
    x[1, :, :4] = 2.0
    check(LAYOUTS[layout](x), window, indices=True)


@needs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [WINDOWS[0], pytest.param(WINDOWS[1], marks=pytest.mark.thorough)], ids=str)
def test_layouts_of_inputs_and_gradients(window: Options, layout: str, device: str) -> None:
    x = LAYOUTS[layout](random_tensor((2, 3, 6, 8), torch.float32, device))
    shape = tuple(F.max_pool2d(x, **window).shape)
    gradient = LAYOUTS[layout](random_tensor(shape, torch.float32, device, seed=1))
    check_against_stock(pooling(autograd.max_pool2d, window), pooling(F.max_pool2d, window), [x], gradient)


@needs_kernels
@pytest.mark.parametrize("shape", [(2, 3, 11), pytest.param((3, 11), marks=pytest.mark.thorough)], ids=str)
@pytest.mark.parametrize(
    "window",
    [
        {"kernel_size": 2},
        {"kernel_size": (3,), "stride": (2,), "padding": 1, "ceil_mode": True},
        {"kernel_size": 3, "stride": 2, "dilation": 2},
    ],
    ids=str,
)
def test_one_dimension(shape: tuple[int, ...], window: Options, device: str) -> None:
    x = random_tensor(shape, torch.float32, device)
    check(x, window, autograd.max_pool1d)
    check(x.transpose(-1, -2).contiguous().transpose(-1, -2), window, autograd.max_pool1d, indices=True)


# Between them they take every kernel of volumes.
VOLUME_WINDOWS: list[Options] = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (1, 2, 2)},
    {"kernel_size": (2, 3, 1), "stride": (1, 2, 3), "padding": (1, 0, 0), "dilation": (2, 1, 1), "ceil_mode": True},
    {"kernel_size": (1, 3, 3), "stride": (1, 2, 2), "padding": (0, 1, 1)},
    {"kernel_size": 1},
]


@needs_kernels
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize(
    "window",
    [*VOLUME_WINDOWS[:4], *(pytest.param(window, marks=pytest.mark.thorough) for window in VOLUME_WINDOWS[4:])],
    ids=str,
)
def test_volumes(window: Options, layout: torch.memory_format, device: str) -> None:
    x = random_tensor((2, 3, 4, 5, 7), torch.float32, device).div(3).round()  # with ties
    if layout is torch.contiguous_format:  # elsewhere PyTorch's CPU code picks another element of them
        x[0, 0] = -float("inf")
    x[1, 1][x[1, 1] > 0] = float("nan")
    check(x.contiguous(memory_format=layout), window, autograd.max_pool3d, indices=True)


@needs_kernels
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_layouts_of_volumes(arrangement: str, device: str) -> None:
    x = ARRANGEMENTS[arrangement](random_tensor((2, 3, 4, 5, 6), torch.float32, device))
    check(x, {"kernel_size": 2}, autograd.max_pool3d)


@needs_kernels
@pytest.mark.parametrize(
    ("positions", "window"),
    [(2, {"kernel_size": 2}), (3, {"kernel_size": 3, "stride": 2, "padding": 1}), (4, {"kernel_size": 4})],
    ids=str,
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_lines(positions: int, window: Options, channels_last: bool, device: str) -> None:
    """Windows that kernels are compiled for: their codes are 1 or 2 bits."""
    x = random_tensor((2, 8, 40), torch.float32, device)
    x = x.transpose(1, 2).contiguous().transpose(1, 2) if channels_last else x
    check(x, window, autograd.max_pool1d, indices=True)
    with saved_tensors() as saved:
        y = autograd.max_pool1d(leaf(x), **window)
    bits = (positions - 1).bit_length()
    rows, columns = (2 * y.shape[2], 8) if channels_last else (16, y.shape[2])
    assert saved.bytes == rows * ((columns * bits + 7) // 8)


@needs_kernels
@pytest.mark.parametrize("fixed", [fixed for fixed in pool_window.FIXED_WINDOWS if fixed.directions], ids=str)
def test_windows_with_kernels_of_their_own_are_exact(fixed: pool_window.Fixed, device: str) -> None:
    """Of integers with ties; in both memory formats, of images that are cells of whole windows, and that aren't."""
    name, overlap = f"max_pool{fixed.directions}d", fixed.kernel - fixed.stride
    for size, padding in {(8, 0), (13, 0), (8, overlap)}:
        window = {"kernel_size": fixed.kernel, "stride": fixed.stride, "padding": padding}
        x = random_tensor((2, 3, *[size] * fixed.directions), torch.float32, device).round()
        for operand in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
            found = []
            for module in (autograd, F):
                image = leaf(operand)
                y = getattr(module, name)(image, **window)
                gradient = torch.arange(y.numel(), dtype=y.dtype, device=device).view(y.shape)
                found += [(y.detach(), *torch.autograd.grad(y, image, gradient))]
            for mine, theirs in zip(*found, strict=True):
                assert torch.equal(mine, theirs)


@needs_kernels
def test_unbatched(device: str) -> None:
    check(random_tensor((3, 8, 7), torch.float32, device), WINDOWS[0])
    check(random_tensor((3, 8, 7), torch.float32, device).transpose(0, 2), WINDOWS[1])
    check(random_tensor((2, 4, 5, 6), torch.float32, device), WINDOWS[0], autograd.max_pool3d)


@needs_kernels
@pytest.mark.parametrize("positions", [17, 257, pytest.param(256, marks=pytest.mark.thorough)])
def test_codes_reach_the_last_position(positions: int, device: str) -> None:
    """A window of more than 256 positions, which a byte can't tell apart, takes the stock operator."""
    choices: list[Choice] = []
    x = torch.arange(2.0 * positions, device=device).view(1, 2, positions)
    with observe_choices(choices.append):
        check(x, {"kernel_size": positions}, autograd.max_pool1d)
    assert {choice.kernel for choice in choices} == {positions <= 256}


@needs_kernels
@pytest.mark.parametrize(
    ("window", "reason"),
    [
        ({"kernel_size": 0}, "a size of the window is not positive"),
        ({"kernel_size": 2, "padding": 2}, "the padding is more than half of the window"),
        ({"kernel_size": 9}, "the image is smaller than the window"),
        (
            {"kernel_size": (1, 2), "padding": (0, 1), "stride": 1, "dilation": (1, 9)},
            "a window may lie beside the image",
        ),
        ({"kernel_size": 2.0}, "a size is not an integer for each direction"),
        ({"kernel_size": (1, 2, 3)}, "a size is not an integer for each direction"),
        ({"kernel_size": 2, "ceil_mode": 1}, "a size is not an integer for each direction"),
    ],
    ids=str,
)
def test_refusals_give_their_reason(window: Options, reason: str, device: str) -> None:
    choices: list[Choice] = []
    x = torch.ones(1, 2, 8, 8, device=device)
    errors = []
    for function in (autograd.max_pool2d, F.max_pool2d):
        with observe_choices(choices.append):
            try:
                function(x, **window)
            except Exception as error:
                errors.append(type(error))
    assert [(choice.path, choice.reason) for choice in choices] == [("stock", reason)]
    assert len(errors) in (0, 2)
    assert len(set(errors)) < 2


@needs_kernels
@pytest.mark.parametrize(
    ("window", "layout"),
    [(WINDOWS[0], "contiguous"), pytest.param(WINDOWS[1], "channels_last", marks=pytest.mark.thorough)],
    ids=str,
)
def test_gradcheck_and_gradgradcheck(window: Options, layout: str, device: str) -> None:
    operand = leaf(LAYOUTS[layout](random_tensor((1, 1, 3, 4), torch.float64, device)))
    assert torch.autograd.gradcheck(pooling(autograd.max_pool2d, window), operand)
    assert torch.autograd.gradgradcheck(pooling(autograd.max_pool2d, window), operand)


@needs_kernels
def test_second_derivatives_of_volumes(device: str) -> None:
    operand = leaf(random_tensor((1, 2, 2, 3, 4), torch.float64, device))
    assert torch.autograd.gradgradcheck(pooling(autograd.max_pool3d, {"kernel_size": 2}), operand)


@needs_kernels
@counts_bytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bytes_and_launches(layout: str, dtype: torch.dtype, device: str) -> None:
    """2x2: 1/16 byte an element is saved, two bits a window."""
    x = leaf(LAYOUTS[layout](random_tensor((1, 32, 16, 64), dtype, device)))
    with measure_traffic() as forward, saved_tensors() as saved:
        y = autograd.max_pool2d(x, 2)
    with measure_traffic() as backward:
        torch.autograd.grad(y, x, torch.ones_like(y))
    for traffic, budget in zip((forward, backward), row_of("max_pool2d").budget(x.shape, dtype), strict=True):
        assert budget / 1.05 < traffic.bytes <= budget * 1.05
        assert traffic.launches == 1
        assert not [operation for operation in traffic.operations if operation.name != "ones_like"]
    assert saved.bytes == x.numel() / 16


@needs_kernels
@counts_bytes
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("name", "shape"), [("max_pool1d", (2, 32, 128)), ("max_pool3d", (1, 32, 4, 16, 16))])
def test_bytes_of_lines_and_volumes(name: str, shape: tuple[int, ...], channels_last: bool, device: str) -> None:
    x = random_tensor(shape, torch.float32, device)
    x = leaf(ARRANGEMENTS["channels_last"](x) if channels_last else x)
    with measure_traffic() as forward:
        y = getattr(autograd, name)(x, 2)
    with measure_traffic() as backward:
        torch.autograd.grad(y, x, torch.ones_like(y))
    for traffic, budget in zip((forward, backward), row_of(name).budget(x.shape, x.dtype), strict=True):
        assert budget / 1.05 < traffic.bytes <= budget * 1.05
        assert traffic.launches == 1


@needs_kernels
@counts_bytes
def test_three_by_three_saves_half_a_byte(device: str) -> None:
    x = leaf(random_tensor((2, 32, 15, 15), torch.float32, device).contiguous(memory_format=torch.channels_last))
    with saved_tensors() as saved:
        y = autograd.max_pool2d(x, 3, 2)
    assert saved.bytes == y.numel() / 2
    with measure_traffic() as inference, torch.no_grad():
        autograd.max_pool2d(x, 3, 2)
    assert inference.stored_bytes == 4 * y.numel()  # no code


@needs_kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_compiled(layout: str, device: str) -> None:
    torch._dynamo.reset()

    def network(x: Tensor) -> Tensor:
        y, indices = autograd.max_pool2d(x, 3, 2, 1, return_indices=True)
        return (autograd.max_pool2d(y, 2) * 2).sum((2, 3)) + indices.sum()

    x = leaf(LAYOUTS[layout](random_tensor((2, 3, 9, 8), torch.float32, device)))
    compiled = torch.compile(network, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    results = [(y, *torch.autograd.grad(y.sum(), x)) for y in (compiled(x), network(x))]
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager)


@needs_kernels
def test_opcheck(device: str) -> None:
    window = ([2, 2], [2, 2], [0, 0], [1, 1], False)
    silu = ("silu", 0.0, 0.0)
    for layout in ("contiguous", "channels_last", "strided"):
        x = LAYOUTS[layout](random_tensor((2, 3, 6, 8), torch.float32, device))
        bias = torch.ones(3, device=device)
        torch.library.opcheck(torch.ops.fusednn.pool.default, (x, x, *[bias] * 4, 1e-5, *silu, *window, True, True))
        _, code, raw, _ = torch.ops.fusednn.pool(x, *[None] * 4, bias, 0.0, *silu, *window, True, False)
        arguments = (x[:, :, :3, :4], code, raw, [6, 8], layout == "channels_last", *silu, *window, True)
        torch.library.opcheck(torch.ops.fusednn.pool_backward.default, arguments)
    torch.library.opcheck(torch.ops.fusednn.activate_.default, (x.clone(), x, bias, "relu", 0.0, 0.0, True))


def test_layers_are_drop_in(device: str) -> None:
    stock = nn.Sequential(nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.Flatten(2), nn.MaxPool1d(2))
    model = copy.deepcopy(stock)
    assert len(fusednn.replace_layers(model).replaced) == 3
    x = random_tensor((2, 3, 12, 13), torch.float32, device)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.jit.script(model)):
        torch.testing.assert_close(twin(x), stock(x))
    assert repr(layers.MaxPool2d(3, 2)) == repr(nn.MaxPool2d(3, 2))
    for mine, theirs in zip(
        layers.MaxPool2d(2, return_indices=True)(x), nn.MaxPool2d(2, return_indices=True)(x), strict=True
    ):
        assert_same_bits(mine, theirs)


def test_checkpoint_autocast_and_transforms(device: str) -> None:
    x = leaf(random_tensor((2, 3, 6, 8), torch.float32, device))
    expected = torch.autograd.grad(F.max_pool2d(x, 2).sum(), x)[0]
    y = torch.utils.checkpoint.checkpoint(layers.MaxPool2d(2), x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert autograd.max_pool2d(x, 2).dtype is F.max_pool2d(x, 2).dtype
    batched = torch.vmap(layers.MaxPool2d(2))(x.detach()[None])
    torch.testing.assert_close(batched[0], F.max_pool2d(x, 2))
    torch.testing.assert_close(torch.func.grad(lambda x: autograd.max_pool2d(x, 2).sum())(x.detach()), expected)


@pytest.mark.parametrize("name", ["max_pool1d", "max_pool2d", "max_pool3d"])
def test_signature(name: str) -> None:
    """``F.max_pool2d`` itself only dispatches; the function behind it has the names and defaults."""
    stock = inspect.signature(getattr(F, f"{name}_with_indices")).parameters.values()
    ours = inspect.signature(getattr(autograd, name)).parameters.values()
    assert [(p.name, p.default, p.kind) for p in ours] == [(p.name, p.default, p.kind) for p in stock]


def test_empty_batches_and_integers(device: str) -> None:
    assert autograd.max_pool2d(torch.ones(0, 3, 4, 4, device=device), 2).shape == (0, 3, 2, 2)
    x = torch.arange(16, device=device).view(1, 1, 4, 4)
    if not ON_GPU:  # CUDA has no integer max pooling
        assert autograd.max_pool2d(x, 2).flatten().tolist() == [5, 7, 13, 15]
    assert autograd.max_pool2d(x.float(), 2).flatten().tolist() == [5, 7, 13, 15]


@pytest.mark.gpu
def test_graph_capture_and_no_synchronisation(device: str) -> None:
    x = leaf(random_tensor((2, 3, 32, 32), torch.float32, device))

    def step() -> tuple[Tensor, ...]:
        y = autograd.max_pool2d(x, 2)
        return (y, *torch.autograd.grad(y, x, torch.ones_like(y)))

    check_capture(step)


def test_kernels_or_stock_as_the_machine_has_it(device: str) -> None:
    choices: list[Choice] = []
    with observe_choices(choices.append):
        layers.MaxPool1d(2)(torch.ones(2, 3, 4, device=device))
    assert [choice.kernel for choice in choices] == [KERNELS_RUN]


def test_windows_that_kernels_are_compiled_for_are_told_by_their_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of those without padding says what is worked out for others."""
    known = pool_window._UNPADDED
    windows = [pool_window.Window(kernel, stride, (0,) * len(kernel), dilation) for kernel, stride, dilation in known]
    windows += [window._replace(padding=(*window.padding[:-1], 1)) for window in windows]
    windows += [window._replace(dilation=(2,) * len(window.dilation)) for window in windows]
    found = [window.fixed for window in windows]
    monkeypatch.setattr(pool_window, "_UNPADDED", {})
    assert found == [window.fixed for window in windows]


def test_sizes_are_stocks() -> None:
    """Also where the last of the windows that rounding up adds would begin behind the image."""
    for kernel, stride, dilation, ceil_mode in itertools.product((1, 2, 3), (1, 2, 3), (1, 2), (False, True)):
        for padding, size in itertools.product(range(kernel // 2 + 1), range(dilation * (kernel - 1) + 1, 9)):
            window = pool_window.Window((kernel,), (stride,), (padding,), (dilation,), ceil_mode)
            y = F.max_pool1d(torch.empty(1, size, device="meta"), kernel, stride, padding, dilation, ceil_mode)
            assert window.pooled(size) == y.shape[1:], (window, size)


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("shape", "window", "passes"),
    [
        ((2, 3, 4, 6), (2, 2, 0), ["forward", "backward"]),
        ((2, 3, 5, 6), (2, 2, 0), []),
        ((2, 3, 4, 8), (3, 2, 1), ["backward"]),
        ((2, 3, 4, 8), (3, 2, 0), []),
        ((2, 3, 4, 6), (3, 2, 1), []),  # three cells in a line
        ((2, 3, 4, 8), (3, 1, 1), []),
        ((2, 3, 8), (2, 2, 0), ["forward", "backward"]),
        ((2, 3, 2, 4, 6), (2, 2, 0), []),
    ],
    ids=str,
)
def test_images_that_windows_cover_take_the_shorter_kernels(
    shape: tuple[int, ...], window: tuple[int, int, int], passes: list[str], device: str
) -> None:
    for layout, expected in {"contiguous": passes, "channels_last": []}.items():
        if layout == "channels_last" and len(shape) != 4:
            continue
        x = leaf(LAYOUTS[layout](random_tensor(shape, torch.float32, device)))
        with launches() as launched:
            getattr(autograd, f"max_pool{len(shape) - 2}d")(x, *window).sum().backward()
        forward, backward = (launch.configuration.label for launch in launched)
        assert [way for way, label in (("forward", forward), ("backward", backward)) if "covered" in label] == expected
