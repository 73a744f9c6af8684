"""Bytes that maxout's functions move, and what they launch."""

import pytest
import torch
from support.maxout import linear_operands

from fusednn import kernels
from fusednn.autograd import maxout, maxout_conv2d, maxout_linear
from fusednn.instruments.saved_tensors import saved_tensors
from fusednn.testing import leaf, random_tensor

if kernels.INTERPRETING:
    from fusednn.instruments.traffic import measure_traffic

counts_bytes = pytest.mark.interpreter


@pytest.mark.kernels
@counts_bytes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("pieces", [2, 3])
def test_linear_keeps_its_budget(pieces: int, dtype: torch.dtype, device: str) -> None:
    """Product and maximum: each operand read once, the maxima and their winners written; nothing in between."""
    rows, units, features = 64, 32, 64  # one tile
    operands = [leaf(t) for t in linear_operands((rows,), units, features, pieces, dtype, device)]
    e = dtype.itemsize
    operand_bytes = sum(operand.numel() * e for operand in operands)
    maxima = rows * units
    with measure_traffic() as forward, saved_tensors() as saved:
        y = maxout_linear(*operands)
    assert forward.launches == 1
    assert not forward.operations
    assert forward.bytes == operand_bytes + maxima * (e + 1)
    assert saved.bytes_beside(*operands) == maxima
    gradient = random_tensor((rows, units), dtype, device)
    with measure_traffic() as backward:
        torch.autograd.grad(y, operands, gradient)
    partial_sums = pieces * units * 4
    assert backward.launches == 1
    assert backward.bytes == maxima * (e + 1 + pieces * e) + partial_sums
    assert {operation.name for operation in backward.operations} <= {"matmul", "sum"}
    with measure_traffic() as inference, torch.no_grad():
        maxout_linear(*operands)
    assert inference.bytes == operand_bytes + maxima * e


@pytest.mark.kernels
@counts_bytes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("dim", "pieces"), [(-1, 2), (-1, 3), (-1, 4), (1, 2), (1, 3)])
def test_maxout_keeps_its_budget(dim: int, pieces: int, dtype: torch.dtype, device: str) -> None:
    x = leaf(random_tensor((8, 12, 16, 12), dtype, device))
    maxima, e = x.numel() // pieces, dtype.itemsize
    with measure_traffic() as forward, saved_tensors() as saved:
        y = maxout(x, pieces, dim)
    gradient = random_tensor(tuple(y.shape), dtype, device)
    with measure_traffic() as backward:
        torch.autograd.grad(y, x, gradient)
    for traffic in (forward, backward):
        assert traffic.bytes == x.numel() * e + maxima * (e + 1)
        assert traffic.launches == 1
        assert not traffic.operations
    assert saved.bytes == maxima


@pytest.mark.kernels
@counts_bytes
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_conv2d_keeps_its_budget(memory_format: torch.memory_format, device: str) -> None:
    x, weight, bias = (
        random_tensor(s, torch.float32, device, i) for i, s in enumerate([(8, 3, 18, 18), (2, 8, 3, 3, 3), (2, 8)])
    )
    operands = [leaf(t) for t in (x.contiguous(memory_format=memory_format), weight, bias)]
    with measure_traffic() as forward, saved_tensors() as saved:
        y = maxout_conv2d(*operands)
    assert y.is_contiguous(memory_format=memory_format)
    assert forward.launches == 1
    assert [operation.name for operation in forward.operations] == ["convolution"]
    tensor = y.numel() * 4
    assert 3.25 * tensor <= forward.bytes <= 1.05 * 3.25 * tensor  # two pieces read, maxima and winners written
    assert saved.bytes_beside(*operands) == y.numel()
    with measure_traffic() as backward:
        torch.autograd.grad(y, operands, torch.ones_like(y))
    assert backward.launches == 1
    assert 3.25 * tensor <= backward.bytes <= 1.05 * 3.25 * tensor
    assert {operation.name for operation in backward.operations} - {"ones_like", "fill_"} == {
        "convolution_backward",
        "sum",
    }
