"""What `torch.compile` is given: PyTorch's operators where it fuses by itself, kernels where they move less."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import fusednn
from fusednn import autograd
from fusednn.autograd.dispatch import Choice, compiler_refusal, judged_as_compiled, observe_choices
from fusednn.testing import random_tensor

pytestmark = pytest.mark.kernels
FUSED = "fused by torch.compile"


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def operators_of(function: Callable[..., object], *operands: object) -> set[str]:
    """The operators of fusednn in the graph of compiled code."""
    found: set[str] = set()

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        found.update(str(node.target) for node in graph.graph.nodes if "fusednn" in str(node.target))
        return graph

    torch.compile(function, fullgraph=True, backend=backend)(*operands)
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
    "bias_activation": lambda x, _: autograd.bias_activation_dropout(x, x.new_ones(8), training=False),
    "channel_bias_activation_dropout": lambda x, _: autograd.bias_activation_dropout(x, slopes=x.new_ones(3), dim=1),
    "nll_loss": lambda x, _: autograd.nll_loss(x, x.new_zeros(4, 8, 8, dtype=torch.int64)),
}
OURS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "max_pool2d": lambda x, _: autograd.max_pool2d(x, 2),
    "cross_entropy": lambda x, t: autograd.cross_entropy(x, t.softmax(1)),
    "bias_activation_dropout": lambda x, _: autograd.bias_activation_dropout(x, x.new_ones(8)),
    "maxout": lambda x, _: autograd.maxout(x, 2),
    "conv_act_pool2d": lambda x, _: autograd.conv_act_pool2d(x, x.new_ones(2, 3, 3, 3), pool_size=2),
    "cumulative_batch_norm": lambda x, _: autograd.batch_norm_act(
        x, x.new_zeros(3), x.new_ones(3), training=True, batches=x.new_zeros((), dtype=torch.int64)
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_the_compiler_fuses(name: str, device: str) -> None:
    """Path, reason, and the graph."""
    operands = X.to(device), T.to(device)
    choices: list[Choice] = []
    with observe_choices(choices.append), judged_as_compiled():
        LEFT[name](*operands)
    assert (name, False, FUSED) in choices
    assert operators_of(LEFT[name], *operands) == set()
    with fusednn.compile_policy("keep"):
        assert operators_of(LEFT[name], *operands)


@pytest.mark.parametrize("name", OURS)
def test_kernels_stay(name: str, device: str) -> None:
    operands = X.to(device), T.to(device)
    choices: list[Choice] = []
    with observe_choices(choices.append), judged_as_compiled():
        OURS[name](*operands)
    assert [choice.operation for choice in choices if choice.kernel] == [name]
    assert operators_of(OURS[name], *operands)


@pytest.mark.parametrize(
    ("shape", "ours"), [((2, 1, 64, 64), False), ((3, 1, 64, 64), True), ((3, 256, 64, 64), False)]
)
def test_pooled_batch_norm_is_ours_where_inductor_divides_a_channel(shape: tuple[int, ...], ours: bool) -> None:
    assert (compiler_refusal("batch_norm_act_pool2d", torch.empty(shape)) is None) == ours
    assert compiler_refusal("batch_norm_act_pool2d", *[torch.empty(shape)] * 2) == FUSED  # a residual
    assert compiler_refusal("batch_norm_act", torch.empty(shape)) == FUSED


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
