"""Convolution with bias, activation and max pooling in one, against PyTorch's chain of operators."""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.activations import PARAMETERS, STOCK
from support.device import FLOAT_DTYPES, KERNELS_RUN, ON_GPU
from support.gpu import capture, no_recompilation, no_synchronisation
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fusednn
from fusednn import autograd, kernels, layers
from fusednn.autograd.dispatch import Choice, observe_choices
from fusednn.autograd.onednn import sound_convolution
from fusednn.instruments.saved_tensors import saved_tensors
from fusednn.testing import LAYOUTS, check_against_stock, leaf, random_tensor

if kernels.INTERPRETING:
    from fusednn.instruments.traffic import measure_traffic

needs_kernels = pytest.mark.kernels
counts_bytes = pytest.mark.interpreter

Options = dict[str, Any]

POOLS: list[Options] = [
    {},
    {"pool_size": 2},
    {"pool_size": 3, "pool_stride": 2, "pool_padding": 1},
    {"pool_size": (2, 3), "pool_stride": 1},
]
QUICK = ("relu", "leaky_relu", "tanh", "silu", "elu")
ACTIVATIONS = [
    pytest.param(name, parameters, marks=[pytest.mark.thorough] * (name not in QUICK))
    for name in sorted(STOCK)
    for parameters in dict.fromkeys([(), PARAMETERS.get(name, ())])
]


def stock(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *arguments: Any,
    activation: str | None = "relu",
    activation_parameters: tuple[float, ...] = (),
    pool_size: Any = None,
    pool_stride: Any = None,
    pool_padding: Any = 0,
) -> Tensor:
    y = F.conv2d(x, weight, bias, *arguments)
    if activation is not None:
        y = STOCK[activation](y, *activation_parameters)
    return y if pool_size is None else F.max_pool2d(y, pool_size, pool_stride, pool_padding)


FUNCTIONS = (autograd.conv_act_pool2d, stock)


def operands(
    dtype: torch.dtype,
    device: str,
    *,
    shape: tuple[int, ...] = (2, 3, 9, 8),
    filters: int = 5,
    kernel: tuple[int, int] = (3, 3),
    groups: int = 1,
) -> list[Tensor]:
    """Images, filters and a bias."""
    weight = random_tensor((filters, shape[-3] // groups, *kernel), dtype, device, seed=1) / 9
    return [random_tensor(shape, dtype, device), weight, random_tensor((filters,), dtype, device, seed=2)]


def check(tensors: list[Tensor], *arguments: Any, **options: Any) -> None:
    def fixed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if len(tensors) == 2:
            return lambda x, weight: function(x, weight, None, *arguments, **options)
        return lambda x, weight, bias: function(x, weight, bias, *arguments, **options)

    theirs = stock(*tensors[:2], None, *arguments, **options)
    gradient = random_tensor(tuple(theirs.shape), theirs.dtype, theirs.device.type, seed=3)
    stride = arguments[0] if arguments else 1
    with sound_convolution(tensors[1], (stride, stride)):
        check_against_stock(fixed(autograd.conv_act_pool2d), fixed(stock), tensors, gradient)
    assert fixed(autograd.conv_act_pool2d)(*tensors).stride() == theirs.stride()


@needs_kernels
@pytest.mark.parametrize(("activation", "parameters"), ACTIVATIONS)
@pytest.mark.parametrize("pool_size", [None, 2])
def test_activations(activation: str, parameters: tuple[float, ...], pool_size: int | None, device: str) -> None:
    tensors = operands(torch.float32, device)
    check(tensors, activation=activation, activation_parameters=parameters, pool_size=pool_size)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pool_size", [None, 2])
def test_selu_in_16_bits(dtype: torch.dtype, pool_size: int | None, device: str) -> None:
    """In both kernels; SELU shares the device functions of ELU, with other parameters."""
    x, *parameters = operands(dtype, device)
    for layout in ("contiguous", "channels_last"):
        check([LAYOUTS[layout](x), *parameters], activation="selu", pool_size=pool_size)


@needs_kernels
@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.smoke
def test_windows(pool: Options, layout: str, device: str) -> None:
    x, *parameters = operands(torch.float32, device)
    check([LAYOUTS[layout](x), *parameters], 1, 1, **pool)


@needs_kernels
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_dtypes(dtype: torch.dtype, device: str) -> None:
    x, *parameters = operands(dtype, device)
    check([LAYOUTS["channels_last"](x), *parameters], pool_size=2)


@needs_kernels
@pytest.mark.parametrize("activation", [None, "gelu", "sigmoid"])
def test_activations_without_pooling_and_pooling_without(activation: str | None, device: str) -> None:
    tensors = operands(torch.float32, device)
    check(tensors, activation=activation)
    check(tensors[:2], activation=activation, pool_size=3, pool_stride=2)


@needs_kernels
@pytest.mark.parametrize(
    ("kernel", "groups", "arguments"),
    [
        ((1, 1), 1, (2,)),
        ((5, 3), 1, (1, (2, 1))),
        ((3, 3), 1, (1, 2, 2)),
        ((3, 3), 3, (1, 1, 1, 3)),
        ((2, 4), 1, (1, "same")),
        ((3, 3), 1, (1, "valid")),
    ],
    ids=str,
)
def test_convolutions(kernel: tuple[int, int], groups: int, arguments: tuple[Any, ...], device: str) -> None:
    tensors = operands(torch.float32, device, kernel=kernel, groups=groups, filters=6)
    check(tensors, *arguments, pool_size=2)
    check([tensors[0][0], *tensors[1:]], *arguments)


@needs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_inputs_and_gradients(layout: str, device: str) -> None:
    """Of integers: where values repeat all windows tie, and no rounding picks another maximum."""
    x, weight, bias = (tensor.round() for tensor in operands(torch.float32, device))
    gradient = LAYOUTS[layout](random_tensor((2, 5, 3, 3), torch.float32, device, seed=3))
    ours, theirs = (lambda x, w, b, f=f: f(x, w, b, pool_size=2) for f in FUNCTIONS)
    check_against_stock(ours, theirs, [LAYOUTS[layout](x), LAYOUTS["channels_last"](weight), bias], gradient)


@needs_kernels
def test_images_of_one_place_give_results_in_stocks_memory_format(device: str) -> None:
    """They are contiguous and channels last at once; what is padded to several places isn't.  In 16 bits, too, where
    the single kernel takes images that are channels last.
    """
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x, weight = (torch.ones(n, 16, 1, 1, dtype=dtype, device=device) for n in (2, 16))
        for pooled in ({}, {"pool_size": 2}):
            y, expected = (f(x, weight, None, 1, 2, **pooled) for f in FUNCTIONS)
            assert y.stride() == expected.stride()


@needs_kernels
def test_extremes(device: str) -> None:
    """NaN and infinities in the images, and a channel that ReLU kills altogether."""
    x, weight, bias = operands(torch.float32, device)
    x[0, :, :4, :4] = float("nan")
    x[1, 0, 0, 0] = float("inf")
    bias[2] = -1000.0
    check([x, weight, bias], pool_size=2)


def test_the_lecture_s_worked_examples(device: str) -> None:
    """A 6x6 image and two 3x3 filters: strides of 1 and 2, zero padding, and 2x2 max pooling."""
    image = torch.tensor(
        [
            [1, 0, 0, 0, 0, 1],
            [0, 1, 0, 0, 1, 0],
            [0, 0, 1, 1, 0, 0],
            [1, 0, 0, 0, 1, 0],
            [0, 1, 0, 0, 1, 0],
            [0, 0, 1, 0, 1, 0],
        ],
        dtype=torch.float32,
        device=device,
    ).view(1, 1, 6, 6)
    diagonal = [[1, -1, -1], [-1, 1, -1], [-1, -1, 1]]
    vertical = [[-1, 1, -1], [-1, 1, -1], [-1, 1, -1]]
    weight = torch.tensor([[diagonal], [vertical]], dtype=torch.float32, device=device)
    maps = [
        [[3, -1, -3, -1], [-3, 1, 0, -3], [-3, -3, 0, 1], [3, -2, -2, -1]],
        [[-1, -1, -1, -1], [-1, -1, -2, 1], [-1, -1, -2, 1], [-1, 0, -4, 3]],
    ]
    for x in (image, image.contiguous(memory_format=torch.channels_last)):
        assert autograd.conv2d(x, weight)[0].tolist() == maps
        assert autograd.conv2d(x, weight[:1], stride=2)[0, 0].tolist() == [[3, -3], [-3, 0]]
        padded = autograd.conv2d(x, weight, padding=1)
        assert padded.shape == (1, 2, 6, 6)
        assert padded[0, :, 1:5, 1:5].tolist() == maps
        pooled = autograd.conv_act_pool2d(x, weight, activation=None, pool_size=2)
        assert pooled[0].tolist() == [[[3, 0], [3, 1]], [[-1, 1], [0, 3]]]
        rectified = autograd.conv_act_pool2d(x, weight, torch.zeros(2, device=device), pool_size=2)
        assert rectified[0].tolist() == [[[3, 0], [3, 1]], [[0, 1], [0, 3]]]


@needs_kernels
def test_gradcheck_and_gradgradcheck(device: str) -> None:
    tensors = [leaf(t) for t in operands(torch.float64, device, shape=(1, 1, 3, 4), filters=1, kernel=(2, 2))]

    def smooth(*tensors: Tensor) -> Tensor:
        return autograd.conv_act_pool2d(*tensors, activation="tanh", pool_size=2, pool_stride=1)

    assert torch.autograd.gradcheck(smooth, tensors)
    assert torch.autograd.gradgradcheck(smooth, tensors)


@needs_kernels
@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_gradients_only_where_needed(needed: tuple[bool, bool, bool], device: str) -> None:
    tensors = operands(torch.float32, device)
    results = []
    for function in (autograd.conv_act_pool2d, stock):
        leaves = [t.clone().requires_grad_(need) for t, need in zip(tensors, needed, strict=True)]
        function(*leaves, pool_size=2).sum().backward()
        results.append([t.grad for t in leaves])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs)


@needs_kernels
@counts_bytes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bytes_launches_and_what_is_saved(layout: str, device: str) -> None:
    """One pass over the convolution's result forward, and one backward; it isn't kept."""
    x, weight, bias = operands(torch.float32, device, shape=(2, 48, 16, 64), filters=32)
    leaves = [leaf(t) for t in (LAYOUTS[layout](x), weight, bias)]
    dense, pooled = 2 * 32 * 16 * 64, 2 * 32 * 8 * 32
    with measure_traffic() as forward, saved_tensors() as saved:
        y = autograd.conv_act_pool2d(*leaves, 1, 1, pool_size=2)
    with measure_traffic() as backward:
        torch.autograd.grad(y, leaves, random_tensor(tuple(y.shape), torch.float32, device).to(y))
    budget = 4 * dense + 4 * pooled + pooled / 2
    assert forward.launches == backward.launches == 1
    assert budget / 1.05 < forward.bytes <= 1.05 * budget
    assert budget / 1.05 < backward.bytes <= 1.05 * budget
    assert [operation.name for operation in forward.operations] == ["convolution"]
    assert saved.bytes_beside(*leaves) == pooled / 2  # four bits: the position, and ReLU's

    with saved_tensors() as saved:
        y = autograd.conv_act_pool2d(*leaves, 1, 1)
    assert saved.bytes_beside(*leaves) == dense / 8


def random_convolution(seed: int) -> tuple[list[Tensor], tuple[Any, ...], Options]:
    """Operands and arguments: any filter, stride, padding and pooling that the single kernel is for."""
    draw = torch.Generator().manual_seed(seed)

    def pick(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=draw))]

    kernel = pick(1, 3, 5, 7, 11)
    stride, padding = (pick(1, 2, 3, 4), pick(1, 2)), (pick(0, 1, kernel // 2), pick(0, kernel // 2, kernel))
    pool = pick({}, {"pool_size": 2}, {"pool_size": 3, "pool_stride": 2, "pool_padding": pick(0, 1)})
    size = [kernel + 2 * step + pick(0, 1, 3) for step in stride]
    shape = (pick(1, 2), pick(1, 3, 5, 16), *size)
    tensors = operands(torch.float32, "cpu", shape=shape, filters=pick(1, 5, 8), kernel=(kernel, kernel))
    return tensors[: pick(2, 3)], (stride, padding), {"activation": pick("relu", "leaky_relu", "silu", None), **pool}


@needs_kernels
@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(s, marks=pytest.mark.thorough) for s in range(8, 64))])
def test_single_kernel_on_any_convolution(seed: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filters, strides, paddings and windows at random, whatever the table would choose."""
    tensors, arguments, options = random_convolution(seed)
    monkeypatch.setattr(kernels.conv, "takes_single", lambda *_: True)
    x, *parameters = (tensor.to(device) for tensor in tensors)
    if options["activation"] is None and "pool_size" not in options:
        options["activation"] = "tanh"
    fixed = [lambda *t, f=f: f(*t[:2], t[2] if len(t) > 2 else None, *arguments, **options) for f in FUNCTIONS]
    gradient = random_tensor(tuple(fixed[1](x, *parameters).shape), torch.float32, device, seed=3)
    with sound_convolution(parameters[0], arguments[0]):
        check_against_stock(*fixed, [LAYOUTS["channels_last"](x), *parameters], gradient)


class OneDNNInBackward(TorchDispatchMode):
    """Records whether oneDNN may compute each gradient of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed: list[bool] = []

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.convolution_backward.default:
            self.allowed.append(bool(torch.backends.mkldnn.enabled))
        return function(*args, **(kwargs or {}))


@needs_kernels
def test_filters_that_skip_pixels_stay_off_onednn(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # PyTorch's flags are frozen, as by torch.testing.
    monkeypatch.setitem(torch.backends.flags_frozen.__globals__, "__allow_nonbracketed_mutation_flag", False)
    x, weight, bias = (leaf(t) for t in operands(torch.float32, device, kernel=(1, 2)))
    allowed = []
    for stride in ((1, 1), (1, 2), (2, 1), (1, 3)):
        y = autograd.conv_act_pool2d(x, weight, bias, stride)
        with OneDNNInBackward() as mode:
            y.sum().backward()
        allowed += mode.allowed
    assert allowed == [True, True, device != "cpu", device != "cpu"]
    assert torch.backends.mkldnn.enabled


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_single_kernel_in_half_precision(dtype: torch.dtype, device: str) -> None:
    """Of integers, so that no rounding decides which of a window is the largest, or positive."""
    x, *parameters = (t.clamp(-1, 1).round() for t in operands(dtype, device, shape=(2, 16, 12, 10), filters=70))
    check([LAYOUTS["channels_last"](x), *parameters], 1, 1, pool_size=2)


@needs_kernels
@counts_bytes
@pytest.mark.parametrize("pool", POOLS[:3], ids=str)
def test_single_kernel_moves_input_weights_result_and_code(
    pool: Options, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.conv, "takes_single", lambda *_: True)
    x, weight, bias = operands(torch.float32, device, shape=(2, 3, 12, 10), filters=64)
    leaves = [leaf(LAYOUTS["channels_last"](t)) for t in (x, weight)] + [leaf(bias)]
    with measure_traffic() as traffic, saved_tensors() as saved:
        y = autograd.conv_act_pool2d(*leaves, 1, 1, **pool)
    (launch,) = traffic.kernel_launches
    code = {0: 1, 2: 4, 3: 8}[pool.get("pool_size", 0)] * y.numel() // 8
    assert launch.kernel == "conv_pool_kernel"
    assert not traffic.operations
    assert launch.stored_bytes == 4 * y.numel() + code
    assert launch.distinct_loaded_bytes == sum(4 * t.numel() for t in leaves)
    assert saved.bytes_beside(*leaves) == code


@needs_kernels
@counts_bytes
@pytest.mark.parametrize(
    ("channels", "kernel", "layout", "options", "single"),
    [
        (16, 3, "channels_last", {"pool_size": 2}, True),
        (3, 3, "channels_last", {"pool_size": 2}, False),  # gathered one by one
        (16, 3, "contiguous", {"pool_size": 2}, False),
        (1, 3, "contiguous", {"pool_size": 2}, False),  # channels last, too, but its result isn't
        (64, 3, "channels_last", {"pool_size": 2}, False),
        (16, 5, "channels_last", {}, True),
        (16, 3, "channels_last", {"pool_size": 3, "pool_stride": 2}, False),
        (16, 3, "channels_last", {"pool_size": 4}, False),
    ],
)
def test_the_table_chooses(
    channels: int, kernel: int, layout: str, options: Options, single: bool, device: str
) -> None:
    tensors = operands(torch.float32, device, shape=(1, channels, 14, 14), kernel=(kernel, kernel), filters=2)
    with measure_traffic() as traffic:
        autograd.conv_act_pool2d(LAYOUTS[layout](tensors[0]), *tensors[1:], **options)
    assert ("conv_pool_kernel" in {launch.kernel for launch in traffic.kernel_launches}) == single


@needs_kernels
def test_float32_is_exact_unless_tf32_is_allowed(device: str) -> None:
    x, weight, _ = operands(torch.float32, device, shape=(2, 16, 9, 8))
    arguments = (LAYOUTS["channels_last"](x), weight, (1, 1), 1, kernels.pool_window.POINT)
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        for precision in ("tf32", "ieee"):
            torch.backends.cudnn.conv.fp32_precision = precision
            assert kernels.conv.takes_single(*arguments) == (precision == "tf32")
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


@needs_kernels
def test_opcheck(device: str) -> None:
    x, weight, bias = operands(torch.float32, device)
    for t in (x, LAYOUTS["channels_last"](x)):
        arguments = (t, weight, bias, [1, 1], [1, 1], "silu", 0.0, 0.0, [2, 2], [2, 2], [0, 0], True)
        torch.library.opcheck(torch.ops.fusednn.conv_pool.default, arguments)


@needs_kernels
def test_a_vgg_needs_at_most_60_percent_of_the_memory(device: str) -> None:
    """VGG-16's layers, a quarter as wide, on small images: both counts scale alike."""
    widths = [[16, 16], [32, 32], [64] * 3, [128] * 3, [128] * 3]
    plain, fused, channels = nn.Sequential(), nn.Sequential(), 3
    for stage in widths:
        for index, width in enumerate(stage):
            plain.extend([nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)])
            cls = layers.ConvMaxPool2d if index == len(stage) - 1 else layers.ConvAct2d
            fused.append(cls(channels, width, 3, padding=1))
            channels = width
        plain.append(nn.MaxPool2d(2))
    convolutions = (layer for layer in plain if isinstance(layer, nn.Conv2d))
    for ours, theirs in zip(fused, convolutions, strict=True):
        ours.load_state_dict(theirs.state_dict())
    x = random_tensor((1, 3, 32, 32), torch.float32, device)
    results, counts = [], []
    for model in (fused.to(device), plain.to(device)):
        with saved_tensors() as saved:
            results.append(model(x))
        counts.append(saved.bytes_beside(*model.parameters()))
    torch.testing.assert_close(*results)
    assert counts[0] <= 0.6 * counts[1]


@needs_kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("pool", POOLS[:2], ids=str)
def test_compiled(layout: str, pool: Options, device: str) -> None:
    torch._dynamo.reset()
    x, *parameters = operands(torch.float32, device)
    tensors = [leaf(t) for t in (LAYOUTS[layout](x), *parameters)]

    def network(*tensors: Tensor) -> Tensor:
        return autograd.conv_act_pool2d(*tensors, 1, 1, **pool) * 2

    compiled = torch.compile(network, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    results = [(y, *torch.autograd.grad(y.sum(), tensors)) for y in (compiled(*tensors), network(*tensors))]
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize(
    "arguments", [{}, {"stride": 2, "padding": 1}, {"padding": 2, "padding_mode": "circular"}], ids=str
)
def test_layers_take_a_convolutions_parameters(arguments: Options, device: str) -> None:
    x = random_tensor((2, 3, 9, 8), torch.float32, device)
    plain = nn.Conv2d(3, 4, 3, **arguments).to(device)
    for layer, expected in (
        (layers.ConvAct2d(3, 4, 3, **arguments), plain(x).relu()),
        (layers.ConvMaxPool2d(3, 4, 3, **arguments, activation="tanh"), F.max_pool2d(plain(x).tanh(), 2)),
        (layers.ConvMaxPool2d(3, 4, 3, **arguments, activation=None, pool_size=3, pool_stride=1), None),
    ):
        if expected is None:
            expected = F.max_pool2d(plain(x), 3, 1)
        layer.to(device).load_state_dict(plain.state_dict())
        plain.load_state_dict(layer.conv.state_dict())
        assert not isinstance(layer, nn.Conv2d)
        for twin in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            torch.testing.assert_close(twin(x), expected)


def test_constructors(device: str) -> None:
    stock_parameters = list(inspect.signature(nn.Conv2d).parameters.values())
    fused = {"activation": "relu", "activation_parameters": ()}
    for cls, extra in (
        (layers.ConvAct2d, fused),
        (layers.ConvMaxPool2d, {**fused, "pool_size": 2, "pool_stride": None, "pool_padding": 0}),
    ):
        ours = list(inspect.signature(cls).parameters.values())
        assert [(p.name, p.default) for p in ours[: len(stock_parameters)]] == [
            (p.name, p.default) for p in stock_parameters
        ]
        assert {p.name: p.default for p in ours[len(stock_parameters) :]} == extra
        assert {p.kind for p in ours[len(stock_parameters) :]} == {inspect.Parameter.KEYWORD_ONLY}
        with pytest.raises(ValueError, match="unknown activation 'rule'"):
            cls(1, 1, 1, activation="rule")
    assert "activation='elu', activation_parameters=(0.5,)" in repr(
        layers.ConvAct2d(3, 4, 3, activation="elu", activation_parameters=[0.5])
    )
    text = repr(layers.ConvMaxPool2d(3, 4, 3, activation=None))
    assert "activation=None, pool_size=2, pool_stride=None, pool_padding=0" in text
    assert "(conv): Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))" in text


def test_plain_convolutions_are_cudnns(device: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"), nn.Flatten(2), nn.Conv1d(4, 2, 3))
    x = random_tensor((2, 3, 6, 6), torch.float32, device)
    expected = model.to(device)(x)
    assert len(fusednn.replace_layers(model).replaced) == 2
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    rows = [row for row in fusednn.explain(model, x) if "conv" in row.operation]
    assert {row.path for row in rows} == {"stock"}
    reason = "cuDNN: no kernel of a plain convolution was measured faster" if KERNELS_RUN else "CPU tensor"
    assert {row.reason for row in rows} == {reason}


@needs_kernels
@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        ({}, {"stride": 0}, "a size of the convolution is not positive"),
        ({}, {"stride": 1.5}, "a size is not an integer for each direction"),
        ({"shape": (2, 3, 2, 2)}, {}, "the image is smaller than the filter"),
        ({}, {"groups": 2}, "the filters don't fit the channels"),
        ({}, {"pool_size": 12}, "the window has more positions than a byte can tell"),
        ({}, {"pool_size": 9}, "the image is smaller than the window"),
        ({}, {"activation": None}, "cuDNN: no kernel of a plain convolution was measured faster"),
    ],
    ids=str,
)
def test_refusals_give_their_reason(change: Options, options: Options, reason: str, device: str) -> None:
    choices: list[Choice] = []
    tensors = operands(torch.float32, device, **change)
    keywords = {key: value for key, value in options.items() if key in ("stride", "groups")}
    arguments = [keywords.get("stride", 1), 0, 1, keywords.get("groups", 1)]
    fused = {key: value for key, value in options.items() if key not in keywords}
    outcomes = []
    for function in (autograd.conv_act_pool2d, stock):
        with observe_choices(choices.append):
            try:
                outcomes.append(function(*tensors, *arguments, **fused).shape)
            except Exception as error:
                outcomes.append(type(error))
    assert [(choice.path, choice.reason) for choice in choices] == [("stock", reason)]
    assert outcomes[0] == outcomes[1]


def test_autocast_checkpoint_and_transforms(device: str) -> None:
    x, weight, bias = operands(torch.float32, device)
    layer = layers.ConvMaxPool2d(3, 5, 3).to(device)
    expected = stock(x, layer.weight, layer.bias, pool_size=2)
    y = torch.utils.checkpoint.checkpoint(layer, leaf(x), use_reentrant=False)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert layer.weight.grad is not None
    with torch.autocast(device, dtype=torch.bfloat16):
        low = layer(x)
        assert low.dtype is torch.bfloat16
        low.sum().backward()
    assert layer.weight.grad.dtype is torch.float32
    batched = torch.vmap(lambda x: autograd.conv_act_pool2d(x, weight, bias, pool_size=2))(x[None])
    torch.testing.assert_close(batched[0], stock(x, weight, bias, pool_size=2))


def test_the_choice_follows_the_machine(device: str) -> None:
    choices: list[Choice] = []
    with observe_choices(choices.append):
        layers.ConvMaxPool2d(3, 5, 3).to(device)(random_tensor((2, 3, 9, 8), torch.float32, device))
    assert [(choice.operation, choice.kernel) for choice in choices] == [("conv_act_pool2d", KERNELS_RUN)]


@pytest.mark.gpu
def test_no_synchronisation_no_recompilation_and_graph_capture(device: str) -> None:
    model = nn.Sequential(
        layers.ConvMaxPool2d(3, 64, 3, padding=1),
        layers.ConvBatchNormAct2d(64, 64, 3, padding=1, pool_size=2),
        layers.ConvAct2d(64, 64, 1, activation="gelu"),
    ).to(device, memory_format=torch.channels_last)

    def step(x: Tensor) -> tuple[Tensor, ...]:
        y = model(x)
        return (y, *torch.autograd.grad(y.sum(), list(model.parameters())))

    def batch(samples: int) -> Tensor:
        return torch.randn(samples, 3, 32, 32, device=device).to(memory_format=torch.channels_last)

    batches = [batch(8), batch(5)]
    for x in batches:
        step(x)
    with no_recompilation("pool", "conv"), no_synchronisation():
        for index in range(50):
            step(batches[index % 2])

    model.eval()
    graph, captured = capture(lambda: step(batches[0]))
    graph.replay()
    for ours, eager in zip(captured, step(batches[0]), strict=True):
        torch.testing.assert_close(ours, eager)
