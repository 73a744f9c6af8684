"""What only a GPU can show: no host synchronisation, no recompilation, graph capture, compiled results, fused speed."""

import pytest
import torch
from support.gpu import capture, no_recompilation, no_synchronisation
from support.pytorch_samples import MODULES
from support.samples import CASES, LAYERS, Case
from torch import Tensor, nn

import fusednn
from fusednn import layers
from fusednn.testing import leaf, random_tensor

pytestmark = pytest.mark.gpu

every_case = pytest.mark.parametrize("case", [*CASES, Case("rrelu", {"training": True})], ids=str)


def step(case: Case, operands: list[Tensor], gradient: Tensor) -> tuple[Tensor, ...]:
    y = case.ours(*operands)
    return (y, *torch.autograd.grad(y, operands, gradient))


@every_case
def test_no_host_synchronisation(case: Case, device: str) -> None:
    operands = [leaf(operand) for operand in case.operands(random_tensor((4, 3, 100), torch.float32, device))]
    gradient = torch.ones(4, 3, 100, device=device)
    step(case, operands, gradient)  # compiles
    with no_synchronisation():
        step(case, operands, gradient)


def test_no_recompilation_over_fifty_steps(device: str) -> None:
    model = nn.Sequential(nn.Linear(30, 64), nn.PReLU(64), nn.Linear(64, 64), nn.RReLU(), nn.ELU(), nn.Softplus())
    model.to(device)
    fusednn.replace_layers(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def train(batch: int) -> None:
        model(torch.randn(batch, 30, device=device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    for batch in (32, 17):  # a full batch and a last, partial one
        train(batch)
    with no_recompilation():
        for index in range(50):
            train(17 if index % 10 == 9 else 32)


@every_case
def test_cuda_graph(case: Case, device: str) -> None:
    operands = [leaf(operand) for operand in case.operands(random_tensor((4, 3, 1000), torch.float32, device))]
    gradient = torch.randn(4, 3, 1000, device=device)
    graph, captured = capture(lambda: step(case, operands, gradient))
    with torch.no_grad():
        operands[0].copy_(random_tensor((4, 3, 1000), torch.float32, device, seed=9))
    graph.replay()
    first = [tensor.clone() for tensor in captured]
    if case.arguments.get("training"):
        slope = (first[0] / operands[0]).detach()
        torch.testing.assert_close(first[1], gradient * slope, rtol=1e-5, atol=1e-5)
        graph.replay()
        assert not torch.equal(first[0], captured[0]), "successive replays drew the same slopes"
    else:
        for ours, eager in zip(first, step(case, operands, gradient), strict=True):
            torch.testing.assert_close(ours, eager, rtol=0, atol=0)


def test_cuda_graph_in_which_results_are_made_again(device: str) -> None:
    """And the peak of a step is lower."""
    stack = [layer for _ in range(4) for layer in (nn.Linear(256, 256), nn.GELU())]
    model = nn.Sequential(*stack).to(device)
    x = torch.randn(4096, 256, device=device)
    gradients, peaks = [], []
    for again in (False, True):
        fusednn.restore_layers(model)
        fusednn.replace_layers(model, recompute=again)

        def step() -> tuple[Tensor, ...]:
            return torch.autograd.grad(model(x).square().sum(), list(model.parameters()))

        step()  # compiles
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        graph, captured = capture(step)
        graph.replay()
        gradients.append([tensor.clone() for tensor in captured])
    assert peaks[1] < peaks[0]
    for kept, made in zip(*gradients, strict=True):
        torch.testing.assert_close(made, kept, rtol=0, atol=0)


@pytest.mark.parametrize("stock_class", MODULES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_results_equal_eager(stock_class: type[nn.Module], mode: str, device: str) -> None:
    torch._dynamo.reset()
    arguments = {nn.Threshold: (0.1, -1.0), nn.RReLU: (0.25, 0.25)}.get(stock_class, ())
    layer = LAYERS[stock_class](*arguments).to(device)
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    for _ in range(3):
        x = leaf(random_tensor((8, 3, 64, 64), torch.float32, device))
        y = compiled(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        y_eager = layer(x)
        (gradient_eager,) = torch.autograd.grad(y_eager.sum(), x)
        torch.testing.assert_close(y, y_eager)
        torch.testing.assert_close(gradient, gradient_eager)


def test_grad_scaler_and_autocast(device: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 64), nn.PReLU(), nn.Linear(64, 64), nn.Softplus(), nn.Linear(64, 3)).to(device)
    fusednn.replace_layers(model)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler(device)
    losses = []
    for _ in range(20):
        with torch.autocast(device, dtype=torch.float16):
            loss = nn.functional.cross_entropy(model(torch.ones(16, 30, device=device)), torch.zeros(16).long().cuda())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_more_than_two_to_the_31_elements(device: str) -> None:
    numel = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 6 * numel:
        pytest.skip("needs 12 GiB of GPU memory")
    x = torch.full((numel,), -1.0, dtype=torch.float16, device=device)
    x[-3:] = 2.0
    layers.ReLU(inplace=True)(x)
    assert x[-4:].tolist() == [0.0, 2.0, 2.0, 2.0]
    assert x.count_nonzero().item() == 3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_launches_on_the_device_of_its_tensors() -> None:
    x = torch.randn(100, device="cuda:1")
    torch.testing.assert_close(layers.ReLU()(x), x.relu())
