"""What recorders make of a model whose neighbours are fused, as docs/exporting.md has it."""

import io
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fusednn


@pytest.fixture
def models() -> tuple[nn.Module, nn.Module, Tensor]:
    """A stock model in evaluation, the same fused, and an input, on the CPU."""
    layers = (nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    built = [nn.Sequential(*layers, nn.Linear(27, 5), nn.GELU(), nn.Dropout(), nn.Softmax(-1)) for _ in range(2)]
    stock, fused = (model.eval() for model in built)
    fused.load_state_dict(stock.state_dict())
    fusednn.replace_layers(fused, fuse=True)
    return stock, fused, torch.randn(2, 2, 8, 8)


def test_scripts_hold_stock_layers(models: tuple[nn.Module, nn.Module, Tensor]) -> None:
    stock, fused, x = models
    scripted = torch.jit.script(fused)
    assert "fusednn::" not in str(scripted.inlined_graph)
    torch.testing.assert_close(scripted(x), stock(x))


def test_symbolic_traces_call_each_layer(models: tuple[nn.Module, nn.Module, Tensor]) -> None:
    stock, fused, x = models
    traced = torch.fx.symbolic_trace(fused)
    assert [str(n.target) for n in traced.graph.nodes if n.op == "call_module"] == list(dict(stock.named_children()))
    torch.testing.assert_close(traced(x), stock(x))


@pytest.mark.parametrize("training", [False, True])
def test_programs_of_any_batch_hold_stock_operators(
    models: tuple[nn.Module, nn.Module, Tensor], training: bool
) -> None:
    *both, x = models
    dynamic = ({0: torch.export.Dim("batch", min=2)},)
    programs = [torch.export.export(model.train(training), (x,), dynamic_shapes=dynamic) for model in both]
    theirs, ours = ([str(node.target) for node in program.graph.nodes] for program in programs)
    assert ours == theirs
    longer = torch.cat([x, x.flip(0), x])
    results = []
    for program in programs:
        torch.manual_seed(0)
        results.append(program.module()(longer))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.thorough
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_onnx_holds_what_it_does_of_stock(models: tuple[nn.Module, nn.Module, Tensor], dynamo: bool) -> None:
    """Where onnx and onnxscript are installed."""
    onnx = pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")
    *both, x = models
    operators = []
    for model in both:
        file = io.BytesIO()
        torch.onnx.export(model, (x,), file, dynamo=dynamo)
        exported = onnx.load_from_string(file.getvalue())
        operators.append([node.op_type for node in exported.graph.node])
        (y,) = reference.ReferenceEvaluator(exported).run(None, {exported.graph.input[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), both[0](x))
    theirs, ours = operators
    assert ours == theirs


@pytest.mark.thorough
def test_aot_inductor_compiles_stock_operators(models: tuple[nn.Module, nn.Module, Tensor], tmp_path: Path) -> None:
    stock, fused, x = models
    program = torch.export.export(fused, (x,))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), stock(x))
