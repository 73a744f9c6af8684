"""What `torch.compile` is given: PyTorch's operators where it fuses by itself, kernels where they move less."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusednn
from fusednn import autograd
from fusednn.autograd.batch_norm_chain import batch_norm_chain
from fusednn.autograd.dispatch import Choice, compiler_refusal, judged_as_compiled, observe_choices
from fusednn.autograd.inductor import turns_images
from fusednn.autograd.pool import act_pool
from fusednn.testing import random_tensor

pytestmark = pytest.mark.kernels
FUSED = "fused by torch.compile"
CHANNELS_LAST = "torch.compile makes channels last of these images"
FEW, MANY = nn.Conv2d(3, 64, 3), nn.Conv2d(64, 65, 3)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


class Calling(nn.Module):
    """A function as a module: without convolutions, by which a compiler would choose the images' memory format."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *operands: object) -> object:
        return self.function(*operands)


def operators_of(function: Callable[..., object], *operands: object) -> set[str]:
    """The operators of fusednn in the graph of compiled code."""
    found: set[str] = set()

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        graphs = [module.graph for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
        found.update(str(node.target) for each in graphs for node in each.nodes if "fusednn" in str(node.target))
        return graph

    model = function if isinstance(function, nn.Module) else Calling(function)
    torch.compile(model, fullgraph=True, backend=backend)(*operands)
    return found


X = random_tensor((4, 3, 8, 8), torch.float32, "cpu")
T = X.sigmoid().flip(0)
LEFT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": lambda x, _: autograd.gelu(x),
    "prelu": lambda x, _: autograd.prelu(x, x.new_ones(3)),
    "rrelu": lambda x, _: autograd.rrelu(x, training=True),
    "dropout": lambda x, _: autograd.dropout(x),
    "dropout2d": lambda x, _: autograd.dropout2d(x),
    "softmax": lambda x, _: autograd.softmax(x, 1),
    "mse_loss": lambda x, t: autograd.mse_loss(x, t),
    "batch_norm": lambda x, _: autograd.batch_norm(x, None, None, training=True),
    "batch_norm_act": lambda x, _: autograd.batch_norm_act(x, None, None, training=True),
    "batch_norm_chain": lambda x, _: batch_norm_chain(x, None, None, None, None, True, 0.1, 1e-5, p=0.5),
    "gated_channels": lambda x, _: autograd.gated_channels(x, x[:, :, :1, :1]),
    "bias_activation": lambda x, _: autograd.bias_activation_dropout(x, x.new_ones(8), training=False),
    "channel_bias_activation_dropout": lambda x, _: autograd.bias_activation_dropout(x, slopes=x.new_ones(3), dim=1),
    "nll_loss": lambda x, _: autograd.nll_loss(x, x.new_zeros(4, 8, 8, dtype=torch.int64)),
}
OURS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "max_pool2d": lambda x, _: autograd.max_pool2d(x, 2),
    "cross_entropy": lambda x, t: autograd.cross_entropy(x, t.softmax(1)),
    "bias_activation_dropout": lambda x, _: autograd.bias_activation_dropout(x, x.new_ones(8)),
    "maxout": lambda x, _: autograd.maxout(x, 2),
    "act_pool2d": lambda x, _: act_pool(2, x, 2, None, 0, "relu"),
    "conv_act_pool2d": lambda x, _: autograd.conv_act_pool2d(x, x.new_ones(2, 3, 3, 3), pool_size=2),
    "cumulative_batch_norm": lambda x, _: autograd.batch_norm_act(
        x, x.new_zeros(3), x.new_ones(3), training=True, batches=x.new_zeros((), dtype=torch.int64)
    ),
}


def choices_of(call: Callable[..., Any], *operands: Tensor) -> list[Choice]:
    """Those of a call that is compiled for a GPU with few values a channel."""
    choices: list[Choice] = []
    with observe_choices(choices.append), judged_as_compiled(FEW):
        call(*operands)
    return choices


@pytest.mark.parametrize("name", LEFT)
def test_the_compiler_fuses(name: str, device: str) -> None:
    """Path, reason, and the graph."""
    operands = X.to(device), T.to(device)
    assert (name, False, FUSED) in choices_of(LEFT[name], *operands)
    assert operators_of(LEFT[name], *operands) == set()
    with fusednn.compile_policy("keep"):
        assert operators_of(LEFT[name], *operands)


@pytest.mark.parametrize("name", OURS)
def test_kernels_stay(name: str, device: str) -> None:
    operands = X.to(device), T.to(device)
    assert [choice.operation for choice in choices_of(OURS[name], *operands) if choice.kernel] == [name]
    assert operators_of(OURS[name], *operands)


@pytest.mark.parametrize(
    ("shape", "ours"), [((2, 1, 64, 64), False), ((3, 1, 64, 64), True), ((3, 256, 64, 64), False)]
)
@pytest.mark.parametrize("name", ["batch_norm_act", "batch_norm_act_pool1d", "batch_norm_act_pool2d"])
def test_batch_norm_is_ours_where_inductor_divides_a_channel(name: str, shape: tuple[int, ...], ours: bool) -> None:
    with judged_as_compiled(FEW):
        assert (compiler_refusal(name, torch.empty(shape)) is None) == ours
        assert compiler_refusal(name, *[torch.empty(shape)] * 2) == FUSED  # a residual


@pytest.mark.parametrize(
    ("convolutions", "turned"),
    [
        ([FEW], False),
        ([FEW, MANY], True),
        ([MANY, nn.Conv2d(64, 64, 1, groups=2)], False),
        ([MANY, nn.Conv2d(64, 64, 1, groups=64)], True),
        ([MANY, nn.Conv2d(128, 64, 3)], False),
        ([], False),
    ],
)
def test_images_are_turned_by_a_graphs_convolutions(convolutions: list[nn.Module], turned: bool) -> None:
    """As `torch._inductor` decides, for a graph as a whole; images that are channels-last already stay."""
    x, model = torch.ones(2, 64, 6, 6), nn.Sequential(*convolutions)
    assert turns_images(x, model) == turned
    assert not turns_images(x.to(memory_format=torch.channels_last), model)


def test_batch_norm_isnt_parted_from_pooling(device: str) -> None:
    """Where the compiler has the pooling, it has all of the chain, however large the channels."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 65, 1))
    fusednn.replace_layers(model.to(device), fuse=True)
    assert not operators_of(model, X.to(device).expand(4, -1, -1, -1).repeat(40, 1, 1, 1))


@pytest.mark.parametrize("channels", [64, 65])
@pytest.mark.parametrize("channels_last", [False, True])
def test_convolutions_are_ours_where_images_stay_as_they_are(channels: int, channels_last: bool, device: str) -> None:
    """Compiled, and explained."""
    model = nn.Sequential(nn.Conv2d(3, channels, 3), nn.ReLU(), nn.MaxPool2d(2)).to(device)
    fusednn.replace_layers(model, fuse=True)
    x = X.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    ours = channels == 64 or channels_last
    assert bool(operators_of(model, x)) == ours
    rows = {row.name: row for row in fusednn.explain(torch.compile(model, backend="eager"), x)}
    assert rows["0"].path == ("kernel" if ours else "stock")
    assert ours or rows["0"].reason == CHANNELS_LAST


@pytest.mark.parametrize(
    ("size", "activation", "ours"),
    [(90, nn.ReLU(), False), (91, nn.ReLU(), True), (91, nn.Tanh(), False), (91, nn.LeakyReLU(0.2), True)],
)
def test_convolutions_without_pooling_are_ours_where_sums_are_in_parts(
    size: int, activation: nn.Module, ours: bool, device: str
) -> None:
    """There the compiler has a second launch for the bias's gradient, too; and bits spare bytes."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), activation).to(device)
    fusednn.replace_layers(model, fuse=True)
    x = X.to(device)[:1, :, :1, :1].expand(1, 3, size, size)
    assert bool(operators_of(model, x)) == ours
    assert [(choice.operation, choice.kernel) for choice in choices_of(model, x)] == [("conv_act2d", ours)]


@pytest.fixture
def _policy() -> Iterator[None]:
    yield
    fusednn.compile_policy("fuse")


@pytest.mark.usefixtures("_policy")
def test_policies_are_set_and_put_back(device: str) -> None:
    """Compiled code notices: it is compiled again."""
    seen: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        seen.append(sum("fusednn" in str(node.target) for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(fusednn.layers.ReLU(), fullgraph=True, backend=backend)
    x = torch.ones(3, device=device)
    compiled(x)
    with fusednn.compile_policy("keep"):
        compiled(x)
        with fusednn.compile_policy("fuse"):
            compiled(x)
    compiled(x)
    assert seen == [0, 1]
    fusednn.compile_policy("keep")
    assert operators_of(fusednn.layers.ReLU(), x)
    with pytest.raises(ValueError, match="unknown policy 'all'; known: keep, fuse"):
        fusednn.compile_policy("all")


def test_eager_code_takes_kernels(device: str) -> None:
    choices: list[Choice] = []
    with observe_choices(choices.append):
        autograd.relu(X.to(device))
    assert choices[0].kernel


def test_recorded_kernels_are_all_recorded(device: str) -> None:
    with fusednn.record_kernels():
        program = torch.export.export(nn.Sequential(fusednn.layers.ReLU()), (X.to(device),), strict=True)
    assert any("fusednn" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("in_place", [False, True])
def test_explain_tells_what_the_compiler_is_given(in_place: bool, device: str) -> None:
    model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)).to(device)
    fusednn.replace_layers(model)
    compiled = torch.compile(model, backend="eager")
    if in_place:
        model.compile(backend="eager")
        compiled = model
    rows = {row.name: (row.path, row.reason) for row in fusednn.explain(compiled, X.to(device))}
    assert rows["0"] == ("stock", FUSED)
    assert rows["1"][0] == "kernel"
    assert {row.path for row in fusednn.explain(nn.Sequential(*model), X.to(device))} == {"kernel"}
