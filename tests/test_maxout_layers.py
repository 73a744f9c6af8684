"""Maxout layers: what they compute, learn and hold; their dropout, initialisers and memory formats."""

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.device import FLOAT_DTYPES, KERNELS_RUN
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fusednn
from fusednn.instruments.saved_tensors import saved_tensors
from fusednn.layers import LeakyReLU, Maxout, MaxoutConv2d, init
from fusednn.testing import check_against_stock, random_tensor

every_dtype = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)


def composition(layer: Maxout | MaxoutConv2d, x: Tensor, *parameters: Tensor) -> Tensor:
    """The layer by PyTorch's: each piece a module of its own."""
    weight, bias = parameters if len(parameters) == 2 else (*parameters, None)
    pieces = []
    for p in range(layer.pieces):
        stock: nn.Module
        if isinstance(layer, Maxout):
            stock = nn.Linear(layer.in_features, layer.out_features, bias is not None)
        else:
            stock = nn.Conv2d(
                layer.in_channels,
                layer.out_channels,
                layer.kernel_size,
                layer.stride,
                layer.padding,
                layer.dilation,
                layer.groups,
                bias is not None,
                layer.padding_mode,
            )
        own = {"weight": weight[p]} if bias is None else {"weight": weight[p], "bias": bias[p]}
        pieces.append(torch.func.functional_call(stock, own, (x,)))
    return torch.stack(pieces).max(0).values


def check_layer(layer: Maxout | MaxoutConv2d, x: Tensor) -> None:
    """Value and gradients are those of `composition`."""

    def ours(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    names = [name for name, _ in layer.named_parameters()]
    parameters = [parameter.detach() for parameter in layer.parameters()]
    gradient = random_tensor(tuple(layer(x).shape), x.dtype, str(x.device), seed=7)
    check_against_stock(ours, partial(composition, layer), [x, *parameters], gradient)


LAYERS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "maxout": (partial(Maxout, 16, 6, 3), (5, 16)),
    "conv2d": (partial(MaxoutConv2d, 4, 6, 3, padding=1), (2, 4, 5, 6)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def example(name: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    build, shape = LAYERS[name]
    torch.manual_seed(1)
    return build(device=device, dtype=dtype), random_tensor(shape, dtype, device)


# --- Values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.kernels
@every_dtype
@every_layer
@pytest.mark.smoke
def test_layers(name: str, dtype: torch.dtype, device: str) -> None:
    layer, x = example(name, device, dtype)
    check_layer(layer, x)


@pytest.mark.kernels
@pytest.mark.parametrize("shape", [(9,), (2, 3, 9)], ids=str)
def test_any_batch_shape(shape: tuple[int, ...], device: str) -> None:
    x = random_tensor(shape, torch.float32, device)
    for bias in (True, False):
        check_layer(Maxout(9, 4, bias=bias, device=device), x)


@pytest.mark.kernels
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    "options",
    [{"padding": (1, 2)}, {"padding": "same", "dilation": (2, 1), "kernel_size": (2, 3)}, {"padding": "valid"}],
    ids=str,
)
def test_conv2d_padding(options: dict, padding_mode: str, device: str) -> None:
    layer = MaxoutConv2d(
        4, 6, **{"kernel_size": 3, **options}, groups=2, bias=False, padding_mode=padding_mode, pieces=3, device=device
    )
    check_layer(layer, random_tensor((2, 4, 6, 7), torch.float32, device))
    check_layer(layer, random_tensor((4, 6, 7), torch.float32, device))


# --- Constructors -----------------------------------------------------------------------------------------------------


def test_signatures_follow_stocks() -> None:
    ours, stock = (list(inspect.signature(cls).parameters.values()) for cls in (MaxoutConv2d, nn.Conv2d))
    assert [(p.name, p.default, p.kind) for p in ours[:-1]] == [(p.name, p.default, p.kind) for p in stock]
    assert (ours[-1].name, ours[-1].default, ours[-1].kind) == ("pieces", 2, inspect.Parameter.KEYWORD_ONLY)
    names = list(inspect.signature(Maxout).parameters)
    assert names == [
        *("in_features", "out_features", "pieces", "bias", "device", "dtype"),
        *("dropout", "dropout_on"),
    ]


def test_parameters_and_representation() -> None:
    layer = Maxout(3, 5)
    assert (layer.weight.shape, layer.bias.shape) == ((2, 5, 3), (2, 5))
    assert repr(layer) == "Maxout(in_features=3, out_features=5, pieces=2, bias=True)"
    layer = Maxout(3, 5, 4, False, dropout=0.5, dropout_on="output")
    assert layer.bias is None
    assert list(layer.state_dict()) == ["weight"]
    assert repr(layer) == (
        "Maxout(in_features=3, out_features=5, pieces=4, bias=False, dropout=0.5, dropout_on='output')"
    )
    layer = MaxoutConv2d(4, 6, (3, 2), groups=2, pieces=3)
    assert (layer.weight.shape, layer.bias.shape) == ((3, 6, 2, 3, 2), (3, 6))
    assert repr(layer) == "MaxoutConv2d(4, 6, kernel_size=(3, 2), stride=(1, 1), groups=2, pieces=3)"
    assert Maxout(3, 5, device="meta", dtype=torch.float64).weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Maxout(3, 5, 0), "pieces must be a positive integer"),
        (lambda: Maxout(3, 5, 2.0), "pieces must be a positive integer"),
        (lambda: Maxout(3, 5, dropout=1.5), "dropout must be a probability"),
        (lambda: Maxout(3, 5, dropout=float("nan")), "dropout must be a probability"),
        (lambda: Maxout(3, 5, dropout_on="weights"), 'must be "input" or "output"'),
        (lambda: MaxoutConv2d(3, 5, 3, pieces=-1), "pieces must be a positive integer"),
        (lambda: MaxoutConv2d(3, 6, 3, groups=2), "in_channels must be divisible by groups"),
        (lambda: MaxoutConv2d(3, 6, 3, padding_mode="none"), "padding_mode must be one of"),
        (lambda: MaxoutConv2d(3, 6, 3, padding="same", stride=2), "strided convolutions"),
    ],
)
def test_wrong_arguments(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@every_layer
def test_wrong_inputs_raise_as_in_stock(name: str, device: str) -> None:
    layer, x = example(name, device)
    with pytest.raises(RuntimeError):
        layer(x[:, :-1])
    with pytest.raises(RuntimeError):
        layer(x.double())


# --- In company -------------------------------------------------------------------------------------------------------


@pytest.mark.kernels
@every_layer
def test_copies_pickles_and_state(name: str, device: str) -> None:
    layer, x = example(name, device)
    y = layer(x)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    for duplicate in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(saved, weights_only=False),
    ):
        assert torch.equal(duplicate(x), y)
    torch.manual_seed(2)
    other = LAYERS[name][0](device=device)
    assert not torch.equal(other(x), y)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)


@pytest.mark.kernels
@every_layer
def test_compiled_layers(name: str, device: str) -> None:
    torch._dynamo.reset()
    layer, x = example(name, device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)


@pytest.mark.kernels
def test_compiled_with_dropout(device: str) -> None:
    torch._dynamo.reset()
    x = torch.ones(64, 16, device=device)
    for where in ("input", "output"):
        layer = Maxout(16, 8, dropout=0.5, dropout_on=where, device=device)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert not torch.equal(compiled(x), compiled(x))
        compiled(x).sum().backward()
        assert layer.weight.grad is not None


@every_layer
def test_parametrized_weights(name: str, device: str) -> None:
    layer, x = example(name, device)
    y = layer(x)
    parametrizations.weight_norm(layer, dim=1)
    torch.testing.assert_close(layer(x), y)


@pytest.mark.kernels
def test_a_network_of_them_is_left_by_replacement_and_explained(device: str) -> None:
    network = nn.Sequential(MaxoutConv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), Maxout(144, 5)).to(device)
    report = fusednn.replace_layers(network)
    assert "already a fusednn layer" in str(report)
    assert isinstance(network[3], Maxout)
    explanation = str(fusednn.explain(network, torch.ones(2, 1, 8, 8, device=device)))
    for operation in ("maxout_conv2d", "maxout_linear"):
        (line,) = (line for line in explanation.splitlines() if operation in line)
        assert ("kernel" if KERNELS_RUN else "stock") in line
    fusednn.restore_layers(network)
    assert isinstance(network[0], MaxoutConv2d)


@pytest.mark.kernels
def test_training_follows_the_composition(device: str) -> None:
    """A network of both layers takes the same steps as one of PyTorch's."""
    torch.manual_seed(0)
    ours = nn.Sequential(MaxoutConv2d(1, 4, 3), nn.Flatten(), Maxout(144, 16), Maxout(16, 3, 4)).to(device)
    reference = copy.deepcopy(ours)
    for layer in reference:
        if not isinstance(layer, nn.Flatten):
            layer.forward = lambda x, layer=layer: composition(layer, x, layer.weight, layer.bias)
    losses = []
    for network in (ours, reference):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(1)
        losses.append([])
        for _ in range(4):
            x = torch.randn(8, 1, 8, 8, generator=generator).to(device)
            loss = F.cross_entropy(network(x), torch.arange(8, device=device) % 3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] != losses[0][-1]
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


# --- The memory format of a convolution -------------------------------------------------------------------------------


@pytest.mark.kernels
def test_model_in_channels_last(device: str) -> None:
    network = nn.Sequential(MaxoutConv2d(4, 8, 3), nn.BatchNorm2d(8), MaxoutConv2d(8, 6, 3, pieces=3)).to(device)
    x = random_tensor((2, 4, 9, 9), torch.float32, device)
    y = network(x)
    gradients = torch.autograd.grad(y.square().sum(), network.parameters())
    names = list(network.state_dict())
    converted = copy.deepcopy(network).to(memory_format=torch.channels_last)
    for layer in (converted[0], converted[2]):
        assert isinstance(layer.weight, nn.Parameter)
        assert all(piece.is_contiguous(memory_format=torch.channels_last) for piece in layer.weight)
        assert layer.weight.stride() != layer.weight.contiguous().stride()
    assert list(converted.state_dict()) == names
    z = converted(x.to(memory_format=torch.channels_last))
    assert z.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(z, y)
    found = torch.autograd.grad(z.square().sum(), converted.parameters())
    for mine, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    back = converted.to(memory_format=torch.contiguous_format)
    assert back[0].weight.is_contiguous()


def test_conversions_keep_parameters(device: str) -> None:
    layer = MaxoutConv2d(4, 6, 3).to(device)
    weight = layer.weight
    layer(torch.ones(1, 4, 5, 5, device=device)).sum().backward()
    layer.to(memory_format=torch.channels_last).double()
    assert layer.weight is weight
    assert weight.dtype == weight.grad.dtype == torch.float64
    assert weight[0].is_contiguous(memory_format=torch.channels_last)
    layer.to_empty(device="meta")
    assert layer.weight.is_meta
    assert layer.weight.shape == (2, 6, 4, 3, 3)
    layer = MaxoutConv2d(4, 6, 3).share_memory()
    assert layer.weight.is_shared()


# --- Dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.kernels
def test_dropout_of_the_input(device: str) -> None:
    layer = Maxout(16, 40, 2, False, dropout=0.25, device=device)
    nn.init.ones_(layer.weight)
    torch.manual_seed(1)
    x = torch.ones(100, 16, device=device, requires_grad=True)
    y = layer(x)
    # All outputs of a row see the same input.
    kept = y.detach()[:, :1] * 0.75
    torch.testing.assert_close(y, (kept / 0.75).expand(100, 40))
    assert abs(kept.mean().item() - 12) < 6 * (16 * 0.25 * 0.75 / 100) ** 0.5
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert set(dx.div(40 / 0.75).round(decimals=3).unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(dx.sum(1, keepdim=True) / (40 / 0.75), kept)
    torch.manual_seed(1)
    assert torch.equal(layer(x), y)
    layer.eval()
    torch.testing.assert_close(layer(x), torch.full((100, 40), 16.0, device=device))


@pytest.mark.kernels
def test_dropout_of_the_output(device: str) -> None:
    layer = Maxout(16, 40, dropout=0.25, dropout_on="output", device=device)
    x = random_tensor((300, 16), torch.float32, device)
    torch.manual_seed(1)
    y = layer(x)
    whole = layer.eval()(x)
    kept = y != 0
    torch.testing.assert_close(y, torch.where(kept, whole / 0.75, 0))
    assert abs(kept.float().mean().item() - 0.75) < 6 * (0.25 * 0.75 / y.numel()) ** 0.5


def test_dropout_of_everything_and_of_nothing(device: str) -> None:
    x = random_tensor((4, 16), torch.float32, device)
    for where in ("input", "output"):
        layer = Maxout(16, 5, bias=False, dropout=1.0, dropout_on=where, device=device)
        assert not layer(x).any()
        layer.dropout = 0.0
        assert torch.equal(layer(x), layer.eval()(x))


@pytest.mark.kernels
def test_dropout_saves_no_mask(device: str) -> None:
    x = random_tensor((64, 64), torch.float32, device).requires_grad_()
    winners = 64 * 32  # whose last value is that of a dropped maximum
    layer = Maxout(64, 32, dropout=0.5, dropout_on="output", device=device)
    with saved_tensors() as saved:
        layer(x)
    assert saved.bytes_beside(x, *layer.parameters()) == winners
    layer.dropout_on = "input"
    with saved_tensors() as saved:
        layer(x)
    assert saved.bytes_beside(*layer.parameters()) == winners + x.numel() * 4 + 8  # the dropped input, and a seed


# --- Special cases ----------------------------------------------------------------------------------------------------


@pytest.mark.kernels
@every_dtype
@pytest.mark.parametrize("slope", [0.0, 0.1])
def test_weights_that_make_it_relu_or_leaky_relu(slope: float, dtype: torch.dtype, device: str) -> None:
    """max(a x, x) with identity weights."""
    layer = Maxout(16, 16, bias=False, device=device, dtype=dtype)
    with torch.no_grad():
        layer.weight[0] = slope * torch.eye(16)
        layer.weight[1] = torch.eye(16)
    x = random_tensor((40, 16), dtype, device)
    x[0, :3] = 0
    ours = partial(torch.func.functional_call, layer, layer.state_dict())
    rounded = layer.weight[0, 0, 0].item()  # the slope, in this dtype
    stock = F.relu if slope == 0 else partial(F.leaky_relu, negative_slope=rounded)
    check_against_stock(ours, stock, [x], random_tensor((40, 16), dtype, device, seed=3))


@pytest.mark.kernels
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.2), LeakyReLU(), nn.LeakyReLU(-0.5)], ids=str)
def test_from_linear(activation: nn.Module, bias: bool, device: str) -> None:
    torch.manual_seed(0)
    pair = nn.Sequential(nn.Linear(16, 7, bias), activation).to(device).eval()
    layer = Maxout.from_linear(pair[0], activation)
    assert not layer.training
    assert layer.weight.data_ptr() != pair[0].weight.data_ptr()
    x = random_tensor((30, 16), torch.float32, device).requires_grad_()
    x.data[0] = 0
    y, y_pair = layer(x), pair(x)
    torch.testing.assert_close(y, y_pair)
    gradients = [torch.autograd.grad(result.square().sum(), x)[0] for result in (y, y_pair)]
    torch.testing.assert_close(*gradients)


def test_from_linear_refuses_what_is_not_convex() -> None:
    linear = nn.Linear(3, 4)
    with pytest.raises(TypeError, match="must be ReLU or LeakyReLU, not GELU"):
        Maxout.from_linear(linear, nn.GELU())
    with pytest.raises(ValueError, match="it must be 1 at most"):
        Maxout.from_linear(linear, nn.LeakyReLU(1.5))


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("function", "pieces", "error"), [(torch.abs, 2, 1e-3), (torch.square, 6, 0.06)], ids=["abs", "square"]
)
def test_learns_convex_functions(function: Callable[[Tensor], Tensor], pieces: int, error: float, device: str) -> None:
    """On [-1, 1].  The best six lines are 1/72 apart from x^2; |x| is two lines."""
    torch.manual_seed(0)
    layer = Maxout(1, 1, pieces)
    nn.init.uniform_(layer.weight, -2, 2)
    layer.to(device)
    x = torch.linspace(-1, 1, 65, device=device)[:, None]
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=25, max_eval=40, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.mse_loss(layer(x), function(x))
        value.backward()
        return value

    optimizer.step(loss)
    assert (layer(x) - function(x)).abs().max() < error


# --- Initialisers -----------------------------------------------------------------------------------------------------

INITIALISERS = {
    init.glorot_uniform_: nn.init.xavier_uniform_,
    init.glorot_normal_: nn.init.xavier_normal_,
    init.he_uniform_: nn.init.kaiming_uniform_,
    init.he_normal_: nn.init.kaiming_normal_,
}
every_initialiser = pytest.mark.parametrize("initialiser", INITIALISERS, ids=lambda function: function.__name__)


@every_initialiser
@pytest.mark.parametrize("shape", [(3, 8, 5), (2, 8, 4, 3, 3)], ids=str)
def test_each_piece_is_initialised_as_a_layer_of_its_own(initialiser: Callable, shape: tuple[int, ...]) -> None:
    options = {"mode": "fan_out", "nonlinearity": "leaky_relu", "a": 0.3} if "he_" in initialiser.__name__ else {}
    weight = nn.Parameter(torch.zeros(shape))
    assert initialiser(weight, **options, generator=torch.Generator().manual_seed(4)) is weight
    generator = torch.Generator().manual_seed(4)
    for piece in weight:
        like = INITIALISERS[initialiser](torch.zeros(shape[1:]), **options, generator=generator)
        assert torch.equal(piece, like)


def test_deviations_are_those_of_the_papers() -> None:
    """Of a linear layer's fans, which the pieces don't change."""
    torch.manual_seed(0)
    weight = torch.empty(4, 200, 100)
    for initialiser, variance in (
        (init.glorot_uniform_, 2 / 300),
        (init.glorot_normal_, 2 / 300),
        (init.he_uniform_, 2 / 100),
        (init.he_normal_, 2 / 100),
    ):
        assert initialiser(weight).var().item() == pytest.approx(variance, rel=0.03)
    assert init.glorot_normal_(weight, gain=2.0).var().item() == pytest.approx(8 / 300, rel=0.03)
    for initialise in (init.glorot_normal_, init.glorot_uniform_):
        assert not initialise(weight, gain=0.0).any()
    assert init.he_normal_(weight, mode="fan_out").var().item() == pytest.approx(2 / 200, rel=0.03)


@every_initialiser
def test_initialisers_refuse_a_weight_without_pieces(initialiser: Callable) -> None:
    with pytest.raises(ValueError, match="a maxout weight is"):
        initialiser(torch.zeros(3, 4))


def test_default_initialisation_is_stocks() -> None:
    """Every piece within +-1 / sqrt(fan in), weights and biases, and filling that interval."""
    torch.manual_seed(0)
    for layer, fan_in in ((Maxout(64, 300, 3), 64), (MaxoutConv2d(8, 300, 3, groups=2), 36)):
        for parameter in (layer.weight, layer.bias):
            for piece in parameter:
                assert 0.95 < piece.abs().max().item() * fan_in**0.5 <= 1
    layer = Maxout(8, 4)
    before = layer.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)
