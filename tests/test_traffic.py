"""Bytes and launches, held to the budgets; and what is saved for the backward pass."""

import pytest
import torch
import torch.nn.functional as F
from support.launches import assert_shipped, note_launches
from support.samples import CASES, Case

from fusednn import autograd, kernels
from fusednn.catalogue import row_of
from fusednn.instruments.saved_tensors import saved_tensors
from fusednn.kernels.functions.activation import ACTIVATIONS
from fusednn.testing import leaf, random_tensor

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.interpreter,
]

if kernels.INTERPRETING:
    from fusednn.instruments.traffic import Traffic, measure_traffic

SLACK = 1.05
SHAPE = (8, 16, 64, 16)  # 64 whole tiles


def kernel_name(case: Case) -> str:
    name = "gelu_tanh" if case.arguments.get("approximate") == "tanh" else case.name
    return "leaky_relu" if name == "rrelu" else name  # in evaluation


def traffic_of(case: Case, dtype: torch.dtype, device: str) -> tuple["Traffic", "Traffic", int]:
    operands = [leaf(operand) for operand in case.operands(random_tensor(SHAPE, dtype, device))]
    with measure_traffic() as forward, saved_tensors() as saved:
        y = case.ours(*operands)
    gradient = random_tensor(SHAPE, dtype, device, seed=1)
    with measure_traffic() as backward:
        torch.autograd.grad(y, operands, gradient)
    return forward, backward, saved.bytes


@pytest.mark.parametrize("case", [case for case in CASES if not case.slopes], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_keep_their_budget(case: Case, dtype: torch.dtype, device: str) -> None:
    forward, backward, saved = traffic_of(case, dtype, device)
    numel = torch.Size(SHAPE).numel()
    row = ACTIVATIONS[kernel_name(case)]
    forward_budget, backward_budget = row_of(case.name).budget(torch.Size(SHAPE), dtype)
    assert forward_budget / SLACK < forward.bytes <= forward_budget * SLACK
    assert backward_budget / SLACK < backward.bytes <= backward_budget * SLACK
    assert (forward.launches, backward.launches) == (1, 1)
    assert not forward.operations
    assert not backward.operations
    assert saved == (numel / 8 if row.saves == "mask" else numel * dtype.itemsize)


@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu", "hardtanh", "threshold", "hardsigmoid"])
def test_one_bit_is_saved(name: str) -> None:
    assert ACTIVATIONS[name].saves == "mask"


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_the_output_is_saved(name: str, device: str) -> None:
    x = leaf(random_tensor(SHAPE, torch.float32, device))
    with saved_tensors() as saved:
        y = getattr(autograd, name)(x)
    assert saved.bytes_beside(y) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("slopes", [1, 16])
def test_prelu_keeps_its_budget(slopes: int, layout: torch.memory_format, dtype: torch.dtype, device: str) -> None:
    x = leaf(random_tensor(SHAPE, dtype, device).contiguous(memory_format=layout))
    weight = leaf(torch.rand(slopes, dtype=dtype, device=device))
    gradient = random_tensor(SHAPE, dtype, device, seed=1).contiguous(memory_format=layout)
    with measure_traffic() as forward:
        y = autograd.prelu(x, weight)
    with measure_traffic() as backward:
        torch.autograd.grad(y, (x, weight), gradient)
    ahead, back = row_of("prelu").budget(x.shape, dtype)
    statistics = sum(operation.read_bytes for operation in backward.operations)  # partial sums: apart
    assert forward.bytes <= ahead * SLACK
    assert backward.bytes - statistics <= back * SLACK
    assert statistics <= 0.02 * back
    assert (forward.launches, backward.launches) == (1, 1)
    assert {operation.name for operation in backward.operations} <= {"sum", "_to_copy"}


def test_rrelu_saves_bits_and_a_seed(device: str) -> None:
    x = leaf(random_tensor(SHAPE, torch.float32, device))
    with measure_traffic() as forward, saved_tensors() as saved:
        y = autograd.rrelu(x, training=True)
    with measure_traffic() as backward:
        torch.autograd.grad(y.sum(), x)
    ahead, back = row_of("rrelu").budget(x.shape, x.dtype)
    assert saved.bytes == x.numel() / 8 + 8
    assert forward.bytes <= ahead * SLACK
    # The gradient of a sum is expanded, and copied once: beside the kernel, not in it.
    assert backward.bytes <= back * SLACK
    assert [operation.name for operation in forward.operations] == ["randint"]


def test_no_gradient_no_mask(device: str) -> None:
    x = random_tensor(SHAPE, torch.float32, device)
    with measure_traffic() as traffic, torch.no_grad():
        autograd.relu(x.requires_grad_())
    assert traffic.bytes == 2 * x.numel() * x.itemsize


def test_inplace_allocates_and_moves_no_more(device: str) -> None:
    x = random_tensor(SHAPE, torch.float32, device)
    with measure_traffic() as traffic:
        autograd.relu(x, inplace=True)
    assert traffic.bytes == 2 * x.numel() * x.itemsize
    assert not traffic.operations


def test_what_makes_nothing_counts_nothing(device: str) -> None:
    """PyTorch launches no kernel for an empty result, whatever it would read."""
    x = random_tensor(SHAPE, torch.float32, device)
    with measure_traffic() as traffic:
        torch.as_strided_copy(x, (0,), (1,))
        torch.empty(0, device=device).copy_(x[:0].flatten())
    assert not traffic.operations


@pytest.mark.parametrize("layout", [torch.channels_last, "permuted"], ids=str)
def test_dense_memory_is_never_copied(layout: object, device: str) -> None:
    x = random_tensor(SHAPE, torch.float32, device)
    x = x.permute(2, 0, 3, 1) if layout == "permuted" else x.contiguous(memory_format=layout)
    with measure_traffic() as traffic:
        autograd.silu(x)
    assert not traffic.operations


def test_every_launch_is_a_shipped_configuration(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests and users launch is what the compile check compiles."""
    launched = note_launches(monkeypatch, kernels.base.tiles, kernels.prelu)
    for case in [*CASES, Case("rrelu", {"training": True})]:
        for dtype in (torch.float16, torch.float32):
            operands = [leaf(operand) for operand in case.operands(random_tensor((2, 3, 40), dtype, device))]
            case.ours(*operands).sum().backward()
            case.ours(*[operand.detach() for operand in operands])
    assert launched
    assert_shipped(launched)


def test_eager_counts_follow_from_the_formulae(device: str) -> None:
    """The meter's count of PyTorch's own operators, on a composition that is easily counted by hand."""
    x = leaf(random_tensor((1000,), torch.float32, device))
    with measure_traffic() as forward:
        y = F.softsign(x)
    assert [operation.name for operation in forward.operations] == ["abs", "add", "div"]
    assert forward.aten_bytes == (2 + 2 + 3) * 4000
    repeated = torch.ones((), device=device).expand(1000)  # one number, however often it is repeated
    with measure_traffic() as backward:
        torch.autograd.grad(y, x, repeated)
    assert 4000 + 4 in [operation.read_bytes for operation in backward.operations if operation.name == "div"]
