"""Small tensors, whose operations are left to PyTorch where that costs the host less: a model, and a switch."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.device import DEVICE
from torch import nn

import fusednn
from fusednn import layers
from fusednn.autograd import dispatch
from fusednn.benchmark.quantiles import quiet
from fusednn.kernels.base import figures
from fusednn.kernels.base.figures import COPY_RATE, DRIVER_LAUNCH, SMALL_CALLS, most_small_bytes

_RESULTS = Path(__file__).parents[1] / "bench" / "results" / "host.json"
_REASON = "small: PyTorch's own operator costs the host less"


@pytest.fixture
def _host_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the tests' device wait for the host, as a GPU's do, and nobody has asked for kernels."""
    monkeypatch.setattr(dispatch, "HOST_BOUND", {DEVICE})
    fusednn.always_kernels(False)


def _paths(layer: nn.Module, *inputs: torch.Tensor) -> list[tuple[str, str]]:
    rows = fusednn.explain(layer.to(DEVICE), *inputs).rows
    return [(row.path, row.reason if row.path == "stock" else "") for row in rows]


def _input(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


@pytest.mark.kernels
@pytest.mark.usefixtures("_host_bound")
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (layers.ReLU(), (4, 6)),
        (layers.GELU(), (4, 6)),
        (layers.PReLU(), (4, 6)),
        (layers.Softmax(-1), (4, 6)),
        (layers.Dropout(0.5), (4, 6)),
        (layers.MaxPool2d(2), (1, 2, 4, 4)),
        (layers.BatchNorm2d(2), (2, 2, 4, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_single_operations_on_small_tensors_are_left_to_pytorch(layer: nn.Module, shape: tuple[int, ...]) -> None:
    assert _paths(layer, _input(*shape)) == [("stock", _REASON)]


@pytest.mark.kernels
@pytest.mark.usefixtures("_host_bound")
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (layers.BatchNormAct2d(2), (2, 2, 4, 4)),
        (layers.BiasActivationDropout(6), (4, 6)),
        (layers.Maxout(16, 4, 2), (4, 16)),
        (layers.QuickGELU(), (4, 6)),  # PyTorch takes two operators
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_is_fused_of_several_takes_its_kernel(layer: nn.Module, shape: tuple[int, ...]) -> None:
    assert _paths(layer, _input(*shape)) == [("kernel", "")]


@pytest.mark.kernels
@pytest.mark.usefixtures("_host_bound")
def test_losses_too() -> None:
    x, target = _input(4, 6), torch.tensor([0, 1, 2, 3], device=DEVICE)
    assert _paths(layers.CrossEntropyLoss(), x, target) == [("stock", _REASON)]
    assert _paths(layers.MSELoss(), x, _input(4, 6)) == [("stock", _REASON)]


@pytest.mark.kernels
@pytest.mark.usefixtures("_host_bound")
def test_the_size_is_the_models_and_depends_on_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = {False: 4 * 24, True: 4 * 12}
    monkeypatch.setattr(dispatch, "_most_small_bytes", lambda _, *, differentiable: limit[differentiable])

    def takes_kernel(numel: int, *, needs_gradient: bool) -> bool:
        y = fusednn.autograd.relu(_input(numel).requires_grad_(needs_gradient))
        choices: list[dispatch.Choice] = []
        with dispatch.observe_choices(choices.append):
            fusednn.autograd.relu(_input(numel).requires_grad_(needs_gradient))
        assert not y.requires_grad or choices[0].kernel == (type(y.grad_fn).__name__ == "MaskedActivationBackward")
        return choices[0].kernel

    assert not takes_kernel(24, needs_gradient=False)
    assert takes_kernel(25, needs_gradient=False)
    assert not takes_kernel(12, needs_gradient=True)
    assert takes_kernel(13, needs_gradient=True)
    with torch.no_grad():
        assert not takes_kernel(13, needs_gradient=True)
    # A model in training is explained as it is trained.
    assert _paths(layers.ReLU(), _input(13)) == [("kernel", "")]
    assert _paths(layers.ReLU().eval(), _input(13)) == [("stock", _REASON)]


@pytest.mark.parametrize("operation", SMALL_CALLS)
def test_pytorchs_calls_cost_the_host_less(operation: str) -> None:
    """Else the operation takes its kernel at any size; and a backward pass costs more than none."""
    forward, both = SMALL_CALLS[operation]
    assert all(call.stock < call.ours for call in (forward, both))
    assert all(without < with_gradients for without, with_gradients in zip(forward, both, strict=True))


@pytest.mark.kernels
@pytest.mark.usefixtures("_host_bound")
def test_always_kernels_is_a_switch_and_a_context() -> None:
    layer, x = layers.ReLU(), _input(4, 6)
    with fusednn.always_kernels():
        assert _paths(layer, x) == [("kernel", "")]
        with fusednn.always_kernels(False):
            assert _paths(layer, x) == [("stock", _REASON)]
        assert _paths(layer, x) == [("kernel", "")]
    assert _paths(layer, x) == [("stock", _REASON)]
    fusednn.always_kernels()
    assert _paths(layer, x) == [("kernel", "")]


@pytest.mark.kernels
@pytest.mark.usefixtures("_host_bound")
def test_a_remembered_decision_follows_the_switch() -> None:
    x = _input(4, 6).requires_grad_()

    def node() -> str:
        return type(fusednn.autograd.relu(x).grad_fn).__name__

    for _ in range(5):
        assert node() == "ReluBackward0"
    with fusednn.always_kernels():
        for _ in range(5):
            assert node() == "MaskedActivationBackward"
    assert node() == "ReluBackward0"


@pytest.mark.kernels
@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU waits for the host")
def test_the_interpreters_tensors_take_kernels() -> None:
    fusednn.always_kernels(False)
    assert _paths(layers.ReLU(), _input(4, 6)) == [("kernel", "")]


@pytest.mark.kernels
@pytest.mark.usefixtures("_host_bound", "keeps_kernels")
def test_compiled_code_takes_kernels() -> None:
    def names(gm: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        found.extend(str(node.target) for node in gm.graph.nodes)
        return gm

    found: list[str] = []
    torch.compile(fusednn.autograd.relu, backend=names, fullgraph=True)(_input(4, 6))
    assert any("fusednn.activation" in name for name in found)


def test_the_model_is_of_host_times_and_the_copy_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    call = SMALL_CALLS["relu"][1]
    seconds = (call.stock + 2 * DRIVER_LAUNCH.number) * 1e-6
    assert most_small_bytes("relu", differentiable=True) == int(seconds * COPY_RATE.number / call.passes)
    assert most_small_bytes("batch_norm_act", differentiable=True) == 0
    quicker = {"relu": (call._replace(ours=call.stock),) * 2}
    monkeypatch.setattr(figures, "SMALL_CALLS", quicker)
    assert most_small_bytes("relu", differentiable=True) == 0


@pytest.mark.parametrize(
    ("operation", "row"),
    [
        *(("ReLU", "relu"), ("PReLU", "prelu"), ("Dropout", "dropout"), ("Softmax", "softmax")),
        *(("CrossEntropyLoss", "cross_entropy"), ("MSELoss", "mse_loss"), ("MaxPool2d", "max_pool2d")),
        ("BatchNorm2d", "batch_norm"),
    ],
)
def test_the_host_times_are_those_that_were_measured(operation: str, row: str) -> None:
    """Within a factor of 1.5: machines differ, and what counts are the orders of magnitude."""
    cases = json.loads(_RESULTS.read_text())["cases"]
    for direction, call in zip(("forward", "forward_backward"), SMALL_CALLS[row], strict=True):
        measured = {
            case["contestant"]: quiet(case["cpu_us"])
            for case in cases
            if (case["operation"], case["direction"]) == (operation, direction)
        }
        ours = measured.get("always_kernels", measured["fusednn"])
        assert 1 / 1.5 < call.ours / ours < 1.5
        assert 1 / 1.5 < call.stock / measured["eager"] < 1.5


@pytest.mark.kernels
@pytest.mark.usefixtures("_host_bound")
def test_recompute_wants_little_kept() -> None:
    """In its own thread: one that ends first, or last, changes nothing for the others."""
    with ThreadPoolExecutor(1) as other, fusednn.recompute():
        assert type(fusednn.autograd.relu(_input(4, 6).requires_grad_()).grad_fn).__name__ == "MaskedActivationBackward"
        assert other.submit(dispatch.leaves_small).result()
    assert dispatch.leaves_small()
