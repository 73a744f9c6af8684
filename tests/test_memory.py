"""What every operation does with memory: which it touches, and in which order it leaves its results."""

import copy
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from support.operations import OPERATIONS, OWN, Operation
from support.optimizers import CALLS, parameters, set_gradients
from support.samples import CASES, Case
from torch import Tensor, nn

from fusednn import optim
from fusednn.autograd import dispatch
from fusednn.layers.twin import TWINS
from fusednn.optim.launches import CHUNK
from fusednn.testing import ARRANGEMENTS, assert_same_bits, checked_bounds, poisoned_memory, random_tensor

every_operation = pytest.mark.parametrize("name", OPERATIONS)


def result_and_gradients(
    operation: Operation,
    function: Callable[..., Tensor],
    leaves: Sequence[Tensor],
    incoming: Callable[[Tensor], Tensor] = torch.ones_like,
) -> list[Tensor]:
    """Of operands and parameters."""
    y = operation.call(function, leaves)
    if not y.requires_grad:
        return [y]
    wanted = [operand for operand in leaves if operand.requires_grad]
    wanted += function.parameters() if isinstance(function, nn.Module) else []
    found = torch.autograd.grad(y, wanted, incoming(y), allow_unused=True)
    return [y.detach(), *(gradient for gradient in found if gradient is not None)]


@pytest.mark.kernels
@every_operation
def test_memory_is_written_whole_and_none_besides(name: str) -> None:
    operation = Operation(name, torch.float32)
    with checked_bounds(), poisoned_memory(0xA5):
        first = result_and_gradients(operation, operation.ours, operation.leaves())
    with poisoned_memory(0x5A):
        second = result_and_gradients(operation, operation.ours, operation.leaves())
    for one, other in zip(first, second, strict=True):
        assert_same_bits(one, other, "run twice over different memory")


def one_repeated(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


def every_second(x: Tensor) -> Tensor:
    return x.repeat_interleave(2)[::2]


@pytest.mark.kernels
@pytest.mark.parametrize("placed", [one_repeated, every_second])
@every_operation
def test_vectors_lie_in_memory_as_they_like(name: str, placed: Callable[[Tensor], Tensor]) -> None:
    """Biases, slopes, weights, statistics."""

    def results(change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        operation = Operation(name, torch.float32, change=lambda x: change(placed(x)) if x.dim() == 1 else x)
        with checked_bounds():
            return result_and_gradients(operation, operation.ours, operation.leaves())

    # Not the same bits: PyTorch takes running statistics that are strided.
    torch.testing.assert_close(results(lambda x: x), results(Tensor.contiguous), rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("algorithm", "name", "arguments"), CALLS, ids=lambda value: value if type(value) is str else ""
)
def test_optimizers_touch_their_own_memory_alone(
    algorithm: str, name: str, arguments: dict[str, Any], device: str
) -> None:
    """Of tensors that end inside of a chunk, and behind it."""
    mine = parameters([(3, 5), (), (CHUNK + 1,)], torch.float32, device)
    optimizer = getattr(optim, name)(mine, **arguments, clip_norm=1.0, averaging=0.5)
    set_gradients(0, mine)
    with checked_bounds():
        optimizer.step()


# --- Memory formats ---------------------------------------------------------------------------------------------------

#: Whose results, or their gradients, PyTorch's CPU code makes contiguous in some layouts, where ours keep the layout.
KEEPS_FORMAT = {
    *("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "batch_norm_act", "batch_norm_act in evaluation"),
    *("CrossEntropyLoss", "HuberLoss", "KLDivLoss", "L1Loss", "MSELoss", "NLLLoss", "SmoothL1Loss"),
    *("GLU", "LogSigmoid", "LogSoftmax", "RReLU", "Softmax", "Softmax2d", "Softmin", "gated_halves"),
    *("activation_pool of maxima", "activation_pool of means", "batch_norm_chain of everything"),
    *("batch_norm_pool of maxima", "batch_norm_pool of means"),
}
#: Whose gradients are contiguous as products of matrices, where PyTorch's are transposed for transposed inputs.
CONTIGUOUS_GRADIENTS = {"LinearCrossEntropyLoss", "drop_connect_linear", "maxout_linear"}

STOCK_CLASSES = {stock_class.__name__: stock_class for stock_class in TWINS}


def stock_of(operation: Operation) -> Any:
    """A layer of the stock class with the same values, or a function for which the kernels will be away."""
    if operation.name not in STOCK_CLASSES:
        return operation.ours
    stock: Any = copy.deepcopy(operation.ours)
    stock.__class__ = STOCK_CLASSES[operation.name]
    return stock


def strides(tensor: Tensor) -> tuple[int, ...]:
    """Of the dimensions whose strides mean something."""
    return tuple(stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1)


@pytest.mark.kernels
@pytest.mark.parametrize("name", [*STOCK_CLASSES, *OWN])
def test_results_have_stocks_strides(name: str) -> None:
    """Functions that stock lacks: those of their stock path."""
    operation = Operation(name, torch.float32)
    stock = stock_of(operation)
    deviates = set()
    for layout, arrange in ARRANGEMENTS.items():
        first, *rest = operation.leaves()
        leaves = [arrange(first.detach()).requires_grad_(), *rest]
        ours = result_and_gradients(operation, operation.ours, leaves)
        with mock.patch.object(dispatch, "AVAILABLE", False):
            theirs = result_and_gradients(operation, stock, leaves)
        for mine, other in zip(ours, theirs, strict=True):
            if strides(mine) != strides(other):
                deviates.add(name)
                kept = name in KEEPS_FORMAT and strides(mine) == strides(torch.empty_like(leaves[0]))
                allowed = kept or (name in CONTIGUOUS_GRADIENTS and mine.is_contiguous())
                assert allowed, f"{layout}: {mine.stride()}, stock {other.stride()}"
    assert deviates == {name} & (KEEPS_FORMAT | CONTIGUOUS_GRADIENTS)


@pytest.mark.kernels
@pytest.mark.parametrize("name", [*STOCK_CLASSES, *OWN])
def test_gradients_of_a_repeated_one_have_stocks_strides_or_the_inputs(name: str) -> None:
    """A sum's gradient is one number: in stock it may lose the input's layout, which ours keep."""
    operation = Operation(name, torch.float32)
    stock = stock_of(operation)
    for layout in ("channels_last", "transposed"):
        first, *rest = operation.leaves()
        leaves = [ARRANGEMENTS[layout](first.detach()).requires_grad_(), *rest]
        arguments = (leaves, lambda y: y.new_ones(()).expand(y.shape))
        ours = result_and_gradients(operation, operation.ours, *arguments)
        with mock.patch.object(dispatch, "AVAILABLE", False):
            theirs = result_and_gradients(operation, stock, *arguments)
        for mine, other in zip(ours, theirs, strict=True):
            allowed = {strides(other), strides(torch.empty_like(leaves[0]))}
            contiguous = name in CONTIGUOUS_GRADIENTS and mine.is_contiguous()
            assert contiguous or strides(mine) in allowed, f"{layout}: {mine.stride()}, not one of {allowed}"


@pytest.mark.parametrize("case", [case for case in CASES if case.inplace], ids=str)
def test_in_place_on_memory_with_gaps(case: Case, device: str) -> None:
    memory = random_tensor((2, 8), torch.float32, device)
    ours, stock = memory.clone(), memory.clone()
    x, reference = (tensor.as_strided((2, 3), (8, 2)) for tensor in (ours, stock))
    assert case.ours(x, inplace=True) is x
    case.stock(reference, inplace=True)
    assert not torch.equal(stock, memory)
    torch.testing.assert_close(ours, stock)
    own = torch.empty_strided((2, 3), (8, 2), device=device).copy_(memory[:, ::2][:, :3])  # no view
    assert case.ours(own, inplace=True) is own
    torch.testing.assert_close(own, reference)
