"""Bias, activation, dropout and a residual in one kernel each way, against the chain of stock operators."""

import copy
import pickle
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from support.activations import PARAMETERS, STOCK
from support.device import DEVICE, FLOAT_DTYPES, KERNELS_RUN
from support.dropout import compiled_and_eager
from support.training import losses
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusednn
from fusednn import kernels
from fusednn.autograd import bias_activation_dropout
from fusednn.catalogue import row_of
from fusednn.instruments.saved_tensors import saved_tensors
from fusednn.kernels.functions.activation import ACTIVATIONS
from fusednn.layers import BiasActivationDropout
from fusednn.testing import LAYOUTS, check_against_stock, leaf, random_tensor

if kernels.INTERPRETING:
    from fusednn.instruments.traffic import measure_traffic

needs_kernels = pytest.mark.kernels
every_dtype = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

NAMES = list(ACTIVATIONS)
#: One of each kind of saved tensors: bits that tell of dropout, bits and a seed, the input and a seed (in two ways).
KINDS = ("relu", "leaky_relu", "gelu", "elu")
P = 0.3

#: The rest is for where there is time.
few_kinds = pytest.mark.parametrize(
    "name", [KINDS[0], *(pytest.param(name, marks=pytest.mark.thorough) for name in KINDS[1:])]
)


def chain(name: str, mask_like: Tensor, dim: int, p: float = P) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Ours, with one mask at every call, and the chain of stock operators given that mask."""

    def ours(x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        torch.manual_seed(11)
        return bias_activation_dropout(x, bias, residual, p, name, PARAMETERS.get(name, ()), dim=dim)

    torch.manual_seed(11)
    keep = bias_activation_dropout(torch.ones_like(mask_like), p=p, dim=dim) != 0

    def stock(x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        h = x if bias is None else x + bias.view([-1 if i == dim % x.dim() else 1 for i in range(x.dim())])
        y = STOCK[name](h, *PARAMETERS.get(name, ()))
        y = y * (keep.to(x.dtype) / (1 - p))
        return y if residual is None else y + residual

    return ours, stock


def operands(shape: Sequence[int], dtype: torch.dtype, dim: int = -1) -> list[Tensor]:
    x, residual = (random_tensor(tuple(shape), dtype, DEVICE, seed) for seed in (0, 2))
    return [x, random_tensor((shape[dim],), dtype, DEVICE, seed=3), residual]


def check(name: str, tensors: Sequence[Tensor], gradient: Tensor, dim: int = -1) -> None:
    check_against_stock(
        *chain(name, tensors[0], dim), tensors, gradient, float32_constants=name in ("celu", "hardsigmoid")
    )


@needs_kernels
@pytest.mark.parametrize("name", NAMES)
def test_every_activation(name: str, device: str) -> None:
    check(name, operands((9, 20), torch.float32), random_tensor((9, 20), torch.float32, device, seed=1))


@needs_kernels
@every_dtype
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.smoke
def test_dtypes(name: str, dtype: torch.dtype, device: str) -> None:
    check(name, operands((9, 250), dtype), random_tensor((9, 250), dtype, device, seed=1))


@needs_kernels
@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((7,), 0),  # one sample
        ((300, 7), 1),
        ((2, 3, 300), -1),
        ((3, 64, 5), 1),  # rows narrower than a tile
        ((2, 4, 70), 1),
        ((1, 2, 2047), 1),  # rows wider than a tile
        ((3, 1, 5, 5), 1),  # one channel
        ((4, 3, 5), 0),
        ((1, 6, 1, 1), 1),
    ],
    ids=str,
)
@few_kinds
def test_shapes(name: str, shape: tuple[int, ...], dim: int, device: str) -> None:
    check(name, operands(shape, torch.float32, dim), random_tensor(shape, torch.float32, device, seed=1), dim)


@needs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@few_kinds
def test_layouts(name: str, layout: str, device: str) -> None:
    x, bias, residual = operands((3, 6, 5, 4), torch.float32, 1)
    gradient = random_tensor((3, 6, 5, 4), torch.float32, device, seed=1)
    place = LAYOUTS[layout]
    check(name, [place(x), bias, residual], gradient, 1)
    check(name, [x, bias.repeat_interleave(2)[::2], place(residual)], place(gradient), 1)


@needs_kernels
@few_kinds
@pytest.mark.parametrize("present", ["bias", "residual", "neither"])
def test_missing_operands(name: str, present: str, device: str) -> None:
    x, bias, residual = operands((9, 20), torch.float32)
    ours, stock = chain(name, x, -1)
    tensors = {"bias": [x, bias], "residual": [x, residual], "neither": [x]}[present]
    if present == "residual":
        ours, stock = (lambda x, r, function=function: function(x, None, r) for function in (ours, stock))
    check_against_stock(ours, stock, tensors, random_tensor((9, 20), torch.float32, device, seed=1))


@needs_kernels
@few_kinds
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_gradients_only_where_needed(name: str, wanted: tuple[int, ...], device: str) -> None:
    tensors = operands((9, 20), torch.float32)
    gradient = random_tensor((9, 20), torch.float32, device, seed=1)
    results = []
    for function in chain(name, tensors[0], -1):
        leaves = [leaf(t) if index in wanted else t for index, t in enumerate(tensors)]
        results.append(torch.autograd.grad(function(*leaves), [leaves[index] for index in wanted], gradient))
    torch.testing.assert_close(*results)


@needs_kernels
@pytest.mark.parametrize("name", KINDS)
def test_not_finite_inputs(name: str, device: str) -> None:
    """A NaN stays, whether kept or dropped; an infinity is dropped to NaN, as 0 times infinity is."""
    x, bias, residual = operands((4, 500), torch.float32)
    ours, stock = chain(name, x, -1)
    for value in (float("nan"), float("inf"), -float("inf")):
        x[:, ::3] = value
        reference = stock(x.double(), bias.double(), residual.double())  # in float32 stock's GELU of infinity is NaN
        torch.testing.assert_close(ours(x, bias, residual).double(), reference, equal_nan=True, rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_gradients_with_a_graph_drop_the_same(name: str) -> None:
    leaves = [leaf(x) for x in operands((21, 33), torch.float32)]
    y = bias_activation_dropout(*leaves, 0.4, name)
    upstream = torch.randn_like(y)
    with_graph, without = (
        torch.autograd.grad(y, leaves, upstream, create_graph=create, retain_graph=True) for create in (True, False)
    )
    torch.testing.assert_close(with_graph, without)


@needs_kernels
def test_an_infinite_bias_reaches_its_own_channel_alone(device: str) -> None:
    x = random_tensor((5, 20), torch.float32, device)
    bias = torch.zeros(20, device=device)
    bias[19] = float("inf")
    bias.requires_grad_()
    (gradient,) = torch.autograd.grad(chain("gelu", x, -1)[0](x, bias).sum(), bias)
    assert gradient[:19].isfinite().all()


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("name", KINDS)
def test_evaluation_and_no_dropout(name: str, p: float, device: str) -> None:
    """Also on the stock path."""
    x, bias, residual = operands((21, 33), torch.float32)
    parameters = PARAMETERS.get(name, ())
    gradient = random_tensor((21, 33), torch.float32, device, seed=1)

    def ours(*tensors: Tensor) -> Tensor:
        return bias_activation_dropout(*tensors, p, name, parameters, training=p == 0)

    check_against_stock(ours, chain(name, x, -1, p=0.0)[1], [x, bias, residual], gradient)


@pytest.mark.parametrize("name", KINDS)
def test_always_dropped(name: str, device: str) -> None:
    leaves = [leaf(tensor) for tensor in operands((21, 33), torch.float32)]
    y = bias_activation_dropout(*leaves, 1.0, name)
    assert torch.equal(y, leaves[2])
    dx, db, dr = torch.autograd.grad(y.sum(), leaves)
    assert not dx.any()
    assert not db.any()
    assert (dr == 1).all()


def test_the_stock_path_drops_too(device: str) -> None:
    x = torch.ones(50, 40, dtype=torch.float64, device=device).requires_grad_()
    y = bias_activation_dropout(x.to(torch.float64)[:, :0], p=0.5)
    assert y.shape == (50, 0)
    mixed = bias_activation_dropout(x, torch.zeros(40, device=device), p=0.5)  # dtypes differ
    assert set(mixed.unique().tolist()) == {0.0, 2.0}
    (gradient,) = torch.autograd.grad(mixed.sum(), x)
    assert torch.equal(gradient, mixed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "elu_"}, "unknown activation 'elu_'"),
        ({"activation": "prelu"}, "unknown activation 'prelu'"),
        ({"parameters": (1.0,)}, "relu has 0 parameters, but got 1"),
        ({"activation": "elu", "parameters": (1.0, 2.0)}, "elu has 1 parameter, but got 2"),
        ({"p": 1.5}, "between 0 and 1"),
        ({"p": -0.5}, "between 0 and 1"),
    ],
)
def test_errors(options: dict[str, object], message: str, device: str) -> None:
    with pytest.raises(ValueError, match=message):
        bias_activation_dropout(torch.ones(3, 4, device=device), **options)
    with pytest.raises(ValueError, match=message):
        BiasActivationDropout(4, **options)


@needs_kernels
@pytest.mark.parametrize(
    "name", ["relu", "gelu", *(pytest.param(name, marks=pytest.mark.thorough) for name in KINDS[1::2])]
)
def test_derivatives(name: str, device: str) -> None:
    tensors = [leaf(tensor) for tensor in operands((1, 2), torch.float64)]
    ours, _ = chain(name, tensors[0], -1)
    torch.autograd.gradcheck(ours, tensors)
    torch.autograd.gradgradcheck(ours, tensors)


@needs_kernels
@pytest.mark.parametrize("name", ["relu", "leaky_relu"])
def test_a_second_derivative_of_zero_exists(name: str, device: str) -> None:
    x, bias, _ = (leaf(tensor) for tensor in operands((5, 6), torch.float32))
    y = chain(name, x, -1)[0](x, bias)
    (dx,) = torch.autograd.grad(y.square().sum() + y.sum(), x, create_graph=True)
    assert all(gradient.any() for gradient in torch.autograd.grad(dx.sum(), (x, bias), retain_graph=True))
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert not any(gradient.any() for gradient in torch.autograd.grad(dx.sum(), (x, bias)))


# --- Randomness -------------------------------------------------------------------------------------------------------


@needs_kernels
def test_dropout_is_dropouts(device: str) -> None:
    """Along columns that fill whole tiles the chain walks memory as dropout does, and so draws its mask."""
    for dtype in FLOAT_DTYPES:
        x = torch.ones((16, 512), dtype=dtype, device=device)
        torch.manual_seed(1)
        y = bias_activation_dropout(x.view(-1, 2048), p=P, dim=0)
        torch.manual_seed(1)
        assert torch.equal(y.flatten(), fusednn.autograd.dropout(x, P).flatten())


@needs_kernels
@every_dtype
@pytest.mark.parametrize("name", ["relu", "leaky_relu"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_keep_rate_and_the_gradients_mask(
    name: str, memory_format: torch.memory_format, dtype: torch.dtype, device: str
) -> None:
    x = torch.ones((4, 32, 8, 8), dtype=dtype, device=device).contiguous(memory_format=memory_format).requires_grad_()
    y = bias_activation_dropout(x, p=P, activation=name, dim=1)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient != 0, y != 0)
    # Six deviations: passed by chance with probability 2e-9.
    assert abs((y == 0).double().mean() - P) < 6 * (P * (1 - P) / y.numel()) ** 0.5


def test_seeding_and_checkpoints(device: str) -> None:
    x = random_tensor((30, 40), torch.float32, device).requires_grad_()
    layer = BiasActivationDropout(40, activation="silu").to(device)
    outcomes = []
    for wrap in (False, True):
        torch.manual_seed(5)
        y = checkpoint(layer, x, use_reentrant=False) if wrap else layer(x)
        outcomes.append((y, *torch.autograd.grad(y.square().sum(), (x, layer.bias))))
    for plain, wrapped in zip(*outcomes, strict=True):
        assert torch.equal(plain, wrapped)
    assert not torch.equal(layer(x), y)


# --- Memory -----------------------------------------------------------------------------------------------------------

BUDGETED = (32, 512)  # 8 whole tiles


@needs_kernels
@pytest.mark.interpreter
@few_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_budget(name: str, dtype: torch.dtype, with_residual: bool, device: str) -> None:
    x, bias, residual = (leaf(tensor) for tensor in operands(BUDGETED, dtype))
    leaves = [x, bias, residual] if with_residual else [x, bias]
    g = random_tensor(BUDGETED, dtype, device, seed=1)
    with measure_traffic() as forward, saved_tensors() as saved:
        y = bias_activation_dropout(*leaves, activation=name)
    with measure_traffic() as backward:
        torch.autograd.grad(y, leaves, g)
    bits = x.numel() / 8 if ACTIVATIONS[name].saves == "mask" else 0
    seed = 0 if name == "relu" else 8
    assert saved.bytes_beside(x, bias) == bits + seed, "one bit an element, or the operands; never a mask of bytes"
    alternative = 2 * with_residual + (not bits)
    ahead, back = row_of("bias_activation_dropout").budget(x.shape, dtype, alternative)
    # A program here has 8 rows: it reads the bias once, and leaves a partial sum of the bias's gradient.
    bias_loads, partial_sums = x.itemsize * x.numel() / 8, 4 * x.numel() / 8
    assert ahead < forward.bytes - bias_loads <= 1.05 * ahead
    assert back <= backward.bytes - partial_sums - (0 if bits else bias_loads) <= 1.05 * back
    assert (forward.launches, backward.launches) == (1, 1)
    assert [operation.name for operation in forward.operations] == ["randint"]
    assert {operation.name for operation in backward.operations} <= {"sum", "_to_copy"}
    assert backward.aten_bytes <= partial_sums + 3 * 4 * BUDGETED[1]


@needs_kernels
def test_in_evaluation_relu_keeps_bits_alone(device: str) -> None:
    x, bias, _ = (leaf(tensor) for tensor in operands(BUDGETED, torch.float32))
    with saved_tensors() as saved:
        bias_activation_dropout(x, bias, training=False)
    assert saved.bytes == x.numel() / 8
    with saved_tensors() as saved, torch.no_grad():
        bias_activation_dropout(x, bias)
    assert not saved.tensors


@needs_kernels
def test_launched_configurations_are_compilable(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    launched = set()
    monkeypatch.setattr(
        kernels.bias_activation_dropout, "launch", lambda configuration, *_: launched.add(configuration.label)
    )
    for dtype in FLOAT_DTYPES:
        for shape, dim in (((5, 250), 1), ((5, 64), 1), ((5, 7), 1), ((2, 3, 9), 1), ((2, 3, 256), 1), ((3, 9000), 0)):
            for name in NAMES:
                leaves = [leaf(tensor) for tensor in operands(shape, dtype, dim)]
                bias_activation_dropout(*leaves, activation=name, dim=dim).sum().backward()
            if dim == 1 and dtype is torch.bfloat16:
                bias_activation_dropout(*leaves, slopes=leaf(leaves[1]), dim=dim).sum().backward()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.ones(2, 256, 16, 16, dtype=torch.bfloat16, device=device).to(memory_format=memory_format)
        bias_activation_dropout(leaf(x), activation="gelu", dim=1, of_channels=True).sum().backward()
    assert {configuration.label for configuration in kernels.shipped("bias_activation_dropout")} < launched


# --- The layer --------------------------------------------------------------------------------------------------------


def test_layer(device: str) -> None:
    layer = BiasActivationDropout(6, 0.25, activation="leaky_relu", parameters=(0.2,), dim=1, dtype=torch.float64)
    layer = layer.to(device)
    assert str(layer) == (
        "BiasActivationDropout(6, p=0.25, activation='leaky_relu', parameters=(0.2,), dim=1, bias=True)"
    )
    assert list(layer.state_dict()) == ["bias"]
    assert layer.bias.dtype == torch.float64
    assert not layer.bias.any()
    nn.init.normal_(layer.bias)
    x, residual = (random_tensor((3, 6, 4), torch.float64, device, seed) for seed in (0, 1))
    for duplicate in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        results = []
        for module in (layer, duplicate):
            torch.manual_seed(3)
            results.append(module(x, residual))
        assert torch.equal(*results)
    layer.eval()
    torch.testing.assert_close(layer(x, residual), F.leaky_relu(x + layer.bias.view(6, 1), 0.2) + residual)
    assert list(BiasActivationDropout(6, bias=False).parameters()) == []


def test_a_network_of_chains_trains_as_the_stock_chain(device: str) -> None:
    """The same parameters give the same losses where nothing is dropped; with dropout the loss falls all the same."""
    torch.manual_seed(0)
    fused = nn.Sequential(
        nn.Linear(20, 48, bias=False), BiasActivationDropout(48, 0.0, activation="gelu"), nn.Linear(48, 3)
    ).to(device)
    stock = nn.Sequential(nn.Linear(20, 48), nn.GELU(), nn.Dropout(0.0), nn.Linear(48, 3)).to(device)
    with torch.no_grad():
        stock[0].weight.copy_(fused[0].weight)
        stock[0].bias.zero_()
        stock[3].load_state_dict(fused[2].state_dict())
    dropping = copy.deepcopy(fused)
    dropping[1].p = 0.3
    x, target = torch.randn(32, 20, device=device), torch.arange(32, device=device) % 3

    of_fused, of_stock, with_dropout = (losses(model, x, target, steps=8, lr=0.3) for model in (fused, stock, dropping))
    assert of_fused == pytest.approx(of_stock, rel=1e-5)
    assert with_dropout[-1] < with_dropout[0]


def test_explain(device: str) -> None:
    layer = BiasActivationDropout(4).to(device)
    (row,) = fusednn.explain(layer, torch.ones(3, 4, device=device))
    assert (row.operation, row.path) == ("bias_activation_dropout", "kernel" if KERNELS_RUN else "stock")
    (row,) = fusednn.explain(layer, torch.ones(3, 4, dtype=torch.int64, device=device))
    assert row.path == "stock"


@needs_kernels
def test_autocast_takes_the_bias_in_the_inputs_dtype(device: str) -> None:
    linear, layer = nn.Linear(8, 16, bias=False).to(device), BiasActivationDropout(16, 0.0).to(device)
    nn.init.normal_(layer.bias)
    x = torch.randn(5, 8, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        hidden = linear(x)
        y = layer(hidden)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, F.relu(hidden + layer.bias.bfloat16()))
    y.float().sum().backward()
    assert layer.bias.grad.dtype == torch.float32


# --- torch.compile ----------------------------------------------------------------------------------------------------


@needs_kernels
@few_kinds
def test_compiled_results_equal_eager(name: str, device: str) -> None:
    tensors = [leaf(tensor) for tensor in operands((6, 40), torch.float32)]

    def function(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return bias_activation_dropout(x, bias, residual, activation=name)

    for ours, eager in compiled_and_eager(function, tensors):
        assert torch.equal(ours, eager)


@needs_kernels
@pytest.mark.parametrize(
    ("name", "layout"),
    [("relu", "transposed"), ("silu", "contiguous"), ("leaky_relu", "sliced"), ("prelu", "contiguous")],
)
def test_opcheck(name: str, layout: str, device: str) -> None:
    x, bias, residual = operands((3, 4, 5, 2), torch.float32, 1)
    x = LAYOUTS[layout](x)
    seed = torch.tensor([7], device=device)
    slopes = torch.ones(1, device=device) if name == "prelu" else None
    arguments = (x, bias, residual, seed, slopes, name, 0.1, 0.0, P, 1, False, True)
    torch.library.opcheck(torch.ops.fusednn.bias_activation_dropout.default, arguments)
    y, mask = torch.ops.fusednn.bias_activation_dropout(*arguments)
    saved = (mask, None) if mask.numel() else (x, bias)
    torch.library.opcheck(
        torch.ops.fusednn.bias_activation_dropout_backward.default,
        (x, *saved, seed, slopes, y.stride(), name, 0.1, 0.0, P, 1, False, True),
    )
