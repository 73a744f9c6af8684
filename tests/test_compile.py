"""Under ``torch.compile``: opaque operators with right fakes, the same results, and no graph breaks."""

import copy

import pytest
import torch
from support.samples import CASES, Case
from support.training import assert_same_step
from torch import Tensor, nn

import fusednn
from fusednn import layers
from fusednn.kernels.base.random import draw_seed
from fusednn.testing import LAYOUTS, leaf, random_tensor

pytestmark = pytest.mark.kernels
_ops = torch.ops.fusednn


@pytest.fixture(autouse=True)
def _fresh_compiler(keeps_kernels: None) -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "layout", ["channels_last", *(pytest.param(x, marks=pytest.mark.thorough) for x in ("contiguous", "strided"))]
)
def test_aot_results_equal_eager(case: Case, layout: str, device: str) -> None:
    if case.name == "rrelu":
        case = Case("rrelu", {"lower": 0.25, "upper": 0.25, "training": True})
    compiled = torch.compile(lambda *operands: case.ours(*operands) + 1, fullgraph=True, backend="aot_eager")
    x, *rest = case.operands(LAYOUTS[layout](random_tensor((2, 3, 8, 5), torch.float32, device)))
    results = []
    for function in (compiled, lambda *operands: case.ours(*operands) + 1):
        operands = [leaf(x), *map(leaf, rest)]
        y = function(*operands)
        results.append((y, *torch.autograd.grad(y.square().sum(), operands)))
        assert y.stride() == x.clone().stride()
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["relu", "silu", "elu", "rrelu"])
def test_inplace(name: str, device: str) -> None:
    options = {"lower": 0.25, "upper": 0.25, "training": True} if name == "rrelu" else {}
    function = Case(name, options).ours

    def network(x: Tensor) -> Tensor:
        hidden = x * 2
        function(hidden, inplace=True)
        return hidden * 3

    results = []
    for run in (torch.compile(network, fullgraph=True, backend="aot_eager"), network):
        x = leaf(random_tensor((4, 5), torch.float32, device))
        y = run(x)
        results.append((y, *torch.autograd.grad(y.sum(), x)))
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.thorough
@pytest.mark.parametrize("fuse", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_inductor_on_a_replaced_network_with_dynamic_batches(mode: str, fuse: bool, device: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.PReLU(4), nn.BatchNorm2d(4), nn.ReLU(True), nn.Flatten()).to(device)
    model.append(nn.Linear(144, 5).to(device)).append(nn.Softplus()).append(nn.LogSigmoid())
    fusednn.replace_layers(model, fuse=fuse)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, mode=mode)
    for batch in (8, 6, 7):
        model.zero_grad()  # a CUDA graph's results are those of its last run
        eager.zero_grad()
        x = torch.randn(batch, 1, 8, 8, device=device)
        assert_same_step(compiled, eager, x)


def test_the_graph_holds_our_operators(device: str) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        graphs.append(graph)
        return graph

    with torch.no_grad():
        torch.compile(layers.ReLU(), fullgraph=True, backend=backend)(torch.ones(3, device=device))
    targets = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert [target for target in targets if "fusednn" in str(target)] == [_ops.activation.default]
    assert not any("relu" in str(target) for target in targets)


def test_compiled_func_transforms_take_the_stock_path(device: str) -> None:
    x = torch.randn(4, 5, device=device)
    compiled = torch.compile(torch.vmap(layers.ReLU()), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), x.relu())


def _operator_calls() -> list[object]:
    def tensor(*shape: int) -> Tensor:
        return random_tensor(shape, torch.float32, "cpu")

    x, strided = tensor(3, 5, 700), tensor(4, 6, 5)[:, ::2]
    calls = []
    for t in (x, strided):
        mask = torch.zeros(4096, dtype=torch.uint8)
        strides = t.clone().stride()
        seed = draw_seed(torch.device("cpu"))
        calls += [
            (_ops.activation, (t, "silu", 0.0, 0.0)),
            (_ops.activation_masked, (t, None, "relu", 0.0, 0.0)),
            (_ops.activation_masked, (t, seed, "rrelu", 0.1, 0.3)),
            (_ops.activation_backward, (t, t, "silu", 0.0, 0.0)),
            (_ops.activation_masked_backward, (t, mask, None, strides, "relu", 0.0, 0.0)),
            (_ops.activation_masked_backward, (t, mask, seed, strides, "rrelu", 0.1, 0.3)),
            (_ops.prelu, (t, tensor(t.shape[1]))),
            (_ops.gated, (t, t.flip(0), "silu", 0.0, 0.0)),
            (_ops.gated_backward, (t, t.flip(0), t.flip(1), "gelu", 0.0, 0.0)),
            (_ops.gated_channels, (t.contiguous(), t[:, :, :1], "sigmoid", 0.0, 0.0)),
            (_ops.gated_channels_backward, (t.flip(0), t.contiguous(), t[:, :, :1], "hardsigmoid", 0.0, 0.0)),
            (_ops.gated_halves, (t[..., :4], 2, "sigmoid", 0.0, 0.0, False)),
            (_ops.gated_halves_backward, (t[..., :2], t[..., :4], 2, "sigmoid", 0.0, 0.0, True)),
            (_ops.highway, (t, t.flip(0), t.flip(1), "sigmoid", 0.0, 0.0)),
            (_ops.highway_backward, (t, t.flip(0), t.flip(1), t, "hardsigmoid", 0.0, 0.0)),
            (_ops.block_end, (t, t.flip(0), tensor(t.shape[1]), seed, 0.5, 1, t.shape[0])),
            (_ops.block_end, (t.bfloat16(), t.flip(0), None, seed, 0.5, 0, 1)),
            (_ops.block_end_backward, (t, t.flip(0), tensor(t.shape[1]), seed, strides, t.dtype, 0.5, 1, t.shape[0])),
            (_ops.block_end_backward, (t, None, None, seed, strides, torch.bfloat16, 0.5, 0, 1)),
            (_ops.prelu_backward, (t, t, tensor(t.shape[1]))),
        ]
    calls.append((_ops.activation_, (x.clone(), "silu", 0.0, 0.0)))
    calls.append((_ops.activation_masked_, (x.clone(), None, "relu", 0.0, 0.0)))
    return calls


@pytest.mark.parametrize(("operator", "arguments"), _operator_calls())
def test_opcheck(operator: object, arguments: tuple, device: str) -> None:
    moved = tuple(argument.to(device) if isinstance(argument, Tensor) else argument for argument in arguments)
    torch.library.opcheck(operator.default, moved)
