"""What surrounds a call: function modes, dispatch modes and tracers see what they would see of stock's."""

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.modes import Functions, Operators
from support.pytorch_samples import OPERATORS, SAMPLED, module_samples
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import fusednn
from fusednn import autograd
from fusednn.commands.self_test import FUNCTIONS, function_sample
from fusednn.layers.twin import TWINS

every_module = pytest.mark.parametrize("stock_class", SAMPLED, ids=lambda cls: cls.__name__)


@pytest.fixture(autouse=True)
def _nothing_is_collected() -> Iterator[None]:
    """Modes would see what generators of other tests do when they are collected: PyTorch's that turn gradients off."""
    gc.disable()
    yield
    gc.enable()


def both(stock_class: type[nn.Module], device: str) -> tuple[nn.Module, nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A stock layer, its twin, and arguments of a call."""
    sample = next(iter(module_samples(stock_class, device, torch.float32, training=True)))
    built = []
    for cls in (stock_class, TWINS[stock_class]):
        torch.manual_seed(1)
        built.append(cls(*sample.constructor_input.args, **sample.constructor_input.kwargs).to(device))
    return (*built, sample.forward_input.args, sample.forward_input.kwargs)  # type: ignore[return-value]


@every_module
@pytest.mark.parametrize("mode", [Functions, Operators])
def test_modes_see_stock_of_layers(stock_class: type[nn.Module], mode: type[Any], device: str) -> None:
    stock, ours, arguments, options = both(stock_class, device)
    seen = []
    for module in (stock, ours):
        torch.manual_seed(1)
        with mode() as watching:
            module(*arguments, **options)
        seen.append(watching.seen)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("info", OPERATORS, ids=lambda info: info.full_name)
def test_modes_see_stock_of_functions(info: Any, device: str) -> None:
    name = info.name.removeprefix("nn.functional.")
    sample = next(iter(info.sample_inputs(torch.device(device), torch.float32)))
    seen = []
    for function in (getattr(F, name), getattr(autograd, name)):
        with Functions() as watching:
            function(sample.input, *sample.args, **sample.kwargs)
        seen.append(watching.seen)
    if name in ("sigmoid", "tanh"):  # those that torch.nn's layers call
        seen[0] = [getattr(torch, name)]
    assert seen[0] == seen[1]


class Doubled(TorchFunctionMode):
    """A mode that decides: relu(x) is 2 x."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return 2 * args[0] if func is F.relu else func(*args, **(kwargs or {}))


def chains(device: str) -> list[tuple[nn.Module, Tensor]]:
    conv = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    linear = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.0), nn.Linear(4, 4), nn.MaxPool1d(2))
    norm = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU())
    images, rows = torch.randn(2, 2, 6, 6, device=device), torch.randn(3, 4, device=device)
    return [(conv.to(device), images), (linear.to(device), rows), (norm.to(device), rows)]


@pytest.mark.parametrize("which", range(3), ids=["conv", "linear", "norm"])
def test_modes_decide_in_fused_code(which: int, device: str) -> None:
    model, x = chains(device)[which]
    results = []
    for _ in range(2):
        with Functions() as functions:
            model(x)
        with Operators() as operators:
            model(x)
        with Doubled():
            results.append((functions.seen, operators.seen, model(x)))
        fusednn.replace_layers(model, fuse=True)
    (functions_of_stock, operators_of_stock, expected), (functions_of_ours, operators_of_ours, result) = results
    assert functions_of_ours == functions_of_stock
    assert operators_of_ours == operators_of_stock
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("which", range(3), ids=["conv", "linear", "norm"])
def test_policies_of_selective_checkpointing_see_stock(which: int, device: str) -> None:
    model, x = chains(device)[which]
    outcomes = []
    for _ in range(2):
        asked: list[str] = []

        def policy(context: Any, operator: Any, *_: Any, asked: Any = asked, **__: Any) -> CheckpointPolicy:
            asked.append(str(operator))
            return CheckpointPolicy.MUST_SAVE if "relu" in str(operator) else CheckpointPolicy.PREFER_RECOMPUTE

        contexts = partial(create_selective_checkpoint_contexts, policy)
        y = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
        outcomes.append((asked, torch.autograd.grad(y.square().sum(), list(model.parameters()))))
        fusednn.replace_layers(model, fuse=True)
    (asked_of_stock, expected), (asked_of_ours, gradients) = outcomes
    assert asked_of_ours == asked_of_stock
    assert asked_of_ours
    torch.testing.assert_close(gradients, expected)


@every_module
def test_fake_tensors_are_stocks(stock_class: type[nn.Module], device: str) -> None:
    stock, ours, arguments, _ = both(stock_class, device)
    described = []
    for module in (stock, ours):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            y = module(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments))
        described.append((type(y), y.shape, y.stride(), y.dtype, y.device))
    assert described[0] == described[1]
    assert described[0][0] is FakeTensor


@pytest.mark.kernels
def test_explain_names_the_mode(device: str) -> None:
    model = fusednn.layers.ReLU()
    x = torch.ones(3, device=device)
    with Functions():
        (row,) = fusednn.explain(model, x)
    assert (row.path, row.reason) == ("stock", "under Functions, a mode that may look for PyTorch's own operators")


@pytest.mark.kernels
def test_harmless_modes_keep_the_kernels(device: str) -> None:
    """A default device, and modes that only watch; other people's where their class says so."""

    class Watching(Operators):
        takes_kernels = True

    x = torch.ones(3, device=device)
    for mode in (torch.device(device), FlopCounterMode(display=False), watching := Watching()):
        with mode:
            (row,) = fusednn.explain(fusednn.layers.ReLU(), x)
            assert row.path == "kernel"
    assert watching.seen == ["fusednn.activation.default"]


def flops_of(function: Callable[..., Any], operands: list[Tensor]) -> int:
    """Operations of products, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        results = function(*operands)
        y = results[0] if isinstance(results, tuple) else results
        if y.requires_grad:
            y.sum().backward()
    return counter.get_total_flops()


PRODUCTS = {name: function_sample(row) for name, row in FUNCTIONS.items()}


@pytest.mark.kernels
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_operators_count_the_products_that_they_hold(name: str, layout: torch.memory_format, device: str) -> None:
    """As many as the stock formulation, which serves under a mode."""
    sample = PRODUCTS[name]
    operands = []
    for operand in sample.operands:
        operand = operand.to(device, torch.float32 if operand.is_floating_point() else operand.dtype)
        operand = operand.contiguous(memory_format=layout) if operand.dim() == 4 else operand.clone()
        operands.append(operand.requires_grad_(operand.is_floating_point()))
    ours = flops_of(sample.ours, operands)
    with Functions():
        assert ours == flops_of(sample.ours, operands)


# --- Tracers ----------------------------------------------------------------------------------------------------------


@contextmanager
def warned() -> Iterator[Counter[str]]:
    counted: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield counted
    counted.update(one.category.__name__ for one in caught)


@every_module
def test_jit_trace_warns_where_stock_does(stock_class: type[nn.Module], device: str) -> None:
    stock, ours, arguments, options = both(stock_class, device)
    if options:
        pytest.skip("torch.jit.trace takes no options here")
    counts = []
    for module in (stock, ours):
        with warned() as counted:
            traced = torch.jit.trace(module.eval(), arguments, check_trace=False)
        counts.append(counted)
    assert counts[0] == counts[1]
    torch.testing.assert_close(traced(*arguments), stock(*arguments), equal_nan=True)


def graphs(model: nn.Module, x: Tensor) -> dict[str, torch.fx.Graph]:
    """What each way of recording gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "strict": torch.export.export(model, (x,), strict=True).graph,
            "non-strict": torch.export.export(model, (x,), strict=False).graph,
            "decomposed": torch.export.export(model, (x,), strict=True).run_decompositions().graph,
            "make_fx": make_fx(model)(x).graph,
            "make_fx of fakes": make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(x).graph,
        }


def operators_in(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("which", range(3), ids=["conv", "linear", "norm"])
@pytest.mark.parametrize("fuse", [False, True], ids=["apart", "fused"])
def test_recorded_graphs_hold_stock_operators(which: int, fuse: bool, device: str) -> None:
    model, x = chains(device)[which]
    expected = {way: operators_in(graph) for way, graph in graphs(model.eval(), x).items()}
    fusednn.replace_layers(model, fuse=fuse)
    assert {way: operators_in(graph) for way, graph in graphs(model, x).items()} == expected


@pytest.mark.kernels
def test_recorded_kernels_are_asked_for(device: str) -> None:
    model = nn.Sequential(fusednn.layers.GELU(), fusednn.layers.Softmax(-1))
    x = torch.randn(2, 3, device=device)
    with fusednn.record_kernels():
        program = torch.export.export(model, (x,), strict=True)
    assert operators_in(program.graph) == ["fusednn.activation.default", "fusednn.softmax.default"]
    torch.testing.assert_close(program.module()(x), F.gelu(x).softmax(-1))
    assert "fusednn" not in str(torch.export.export(model, (x,), strict=True).graph)
