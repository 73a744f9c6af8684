"""The end of a block: scale * x, dropped by sample, plus residual, in one pass each way."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from support.device import FLOAT_DTYPES
from torch import Tensor

from fusednn import kernels
from fusednn.autograd import block_end
from fusednn.catalogue import row_of
from fusednn.instruments.saved_tensors import saved_tensors
from fusednn.testing import LAYOUTS, check_against_stock, leaf, random_tensor

if kernels.INTERPRETING:
    from fusednn.instruments.traffic import measure_traffic

#: Shapes of the input and the scale: rows in several tiles and several samples in one, channels first, last, and odd.
SHAPES = [
    ((3, 5, 40), (40,)),
    ((2, 70, 33), (33,)),
    ((3, 6, 5, 7), (6, 1, 1)),
    ((2, 3, 50, 50), (1, 3, 1, 1)),
    ((5, 300), (300,)),
    ((4, 3, 11), None),
    ((3, 1), None),
]


def with_one_seed(p: float, **options: object) -> Callable[..., Tensor]:
    """Ours, which drops the same samples at every call."""

    def ours(*operands: Tensor) -> Tensor:
        torch.manual_seed(5)
        return block_end(*operands, p=p, **options)

    return ours


def in_stock(ours: Callable[..., Tensor], like: Tensor, p: float) -> Callable[..., Tensor]:
    """Plain PyTorch's operators, given the samples that ours keeps."""
    kept = ours(torch.ones_like(like)) != 0
    of_samples = kept.reshape(len(kept), -1)
    assert torch.equal(of_samples.all(1), of_samples.any(1)), "samples are dropped as a whole"
    noise = kept.to(like.dtype) / (1 - p)

    def stock(x: Tensor, residual: Tensor, scale: Tensor | None = None) -> Tensor:
        return (x if scale is None else x * scale) * noise.to(x.dtype) + residual

    return stock


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "scale_shape"), SHAPES, ids=str)
@pytest.mark.smoke
def test_values_and_gradients(
    shape: tuple[int, ...], scale_shape: tuple[int, ...] | None, dtype: torch.dtype, device: str
) -> None:
    x, residual, gradient = (random_tensor(shape, dtype, device, seed) for seed in range(3))
    scales = [] if scale_shape is None else [random_tensor(scale_shape, dtype, device, seed=3)]
    ours = with_one_seed(0.5)
    check_against_stock(ours, in_stock(ours, x, 0.5), [x, residual, *scales], gradient)
    if scales:
        stock = in_stock(lambda one: one, torch.ones_like(x), 0.0)
        check_against_stock(partial(block_end), stock, [x, residual, *scales], gradient)


@pytest.mark.kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, device: str) -> None:
    x, residual, gradient = (random_tensor((3, 6, 5, 4), torch.float32, device, seed) for seed in range(3))
    scale = random_tensor((6, 1, 1), torch.float32, device, seed=3)
    place = LAYOUTS[layout]
    for operands in ([place(x), residual, gradient], [place(x), place(residual), place(gradient)]):
        ours = with_one_seed(0.4)
        check_against_stock(ours, in_stock(ours, operands[0], 0.4), [*operands[:2], scale], operands[2])


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_residuals_and_scales_in_single_precision(dtype: torch.dtype, device: str) -> None:
    """As where autocast computed the input: the result, and the sum behind it, stay float32."""
    x = random_tensor((3, 6, 40), dtype, device)
    residual, gradient = (random_tensor((3, 6, 40), torch.float32, device, seed) for seed in (1, 2))
    scale = random_tensor((40,), torch.float32, device, seed=3)
    ours = with_one_seed(0.5)
    kept = (ours(torch.ones_like(x)) != 0) / 0.5
    operands = [leaf(one) for one in (x, residual, scale)]
    for given in ((x, residual, scale), (x, residual), (x, None, scale)):
        y = ours(*given)
        terms = [part for part in (given[1],) if part is not None]
        expected = sum(terms, x.float() * (given[2] if len(given) == 3 else 1) * kept)
        assert y.dtype is torch.float32
        torch.testing.assert_close(y, expected)
    gradients = torch.autograd.grad(ours(*operands), operands, gradient)
    stock = torch.autograd.grad(operands[0] * operands[2] * kept + operands[1], operands, gradient)
    for mine, theirs in zip(gradients, stock, strict=True):
        assert mine.dtype is theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_keep_rate(mode: str, device: str) -> None:
    """Six deviations; what is kept is divided by the chance to be, and a batch is of one fate."""
    x = torch.ones((4000 if mode == "row" else 40, 1), device=device)
    fates = torch.stack([block_end(x, p=0.25, mode=mode)[:, 0] for _ in range(1 if mode == "row" else 100)])
    torch.testing.assert_close(fates[fates != 0], torch.full_like(fates[fates != 0], 4 / 3))
    if mode == "batch":
        assert (fates == fates[:, :1]).all()
        fates = fates[:, 0]
    deviation = (0.25 * 0.75 / fates.numel()) ** 0.5
    assert abs((fates != 0).double().mean().item() - 0.75) < 6 * deviation


@pytest.mark.kernels
@pytest.mark.interpreter
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_budget(memory_format: torch.memory_format, learns: bool, device: str) -> None:
    """3 elements forward; backward 3 with a scale that learns, else 2.  The residual's gradient is the output's."""
    x, residual = (
        leaf(random_tensor((4, 16, 32, 32), torch.bfloat16, device, seed).contiguous(memory_format=memory_format))
        for seed in range(2)
    )
    scale = random_tensor((16, 1, 1), torch.bfloat16, device, seed=2).requires_grad_(learns)
    with measure_traffic() as forward, saved_tensors() as saved:
        y = block_end(x, residual, scale, 0.2)
    g = random_tensor(y.shape, torch.bfloat16, device, seed=3).contiguous(memory_format=memory_format)
    operands = (x, residual, *[scale] * learns)
    with measure_traffic() as backward:
        _, through, *_ = torch.autograd.grad(y, operands, g)
    budget = row_of("block_end").budget(y.shape, torch.bfloat16)
    tensor = y.numel() * y.itemsize
    assert forward.bytes == pytest.approx(budget[0], rel=0.01)
    assert backward.bytes == pytest.approx(budget[1] if learns else 2 * tensor, rel=0.05)
    assert (forward.launches, backward.launches) == (1, 1)
    assert through.data_ptr() == g.data_ptr()
    assert saved.bytes < tensor * learns + 100


def test_second_derivatives(device: str) -> None:
    x, residual = (leaf(random_tensor((3, 4, 5), torch.float64, device, seed)) for seed in range(2))
    scale = leaf(random_tensor((5,), torch.float64, device))
    for operands in ((x, residual, scale), (x, residual)):
        assert torch.autograd.gradcheck(with_one_seed(0.5), operands)
        assert torch.autograd.gradgradcheck(with_one_seed(0.5), operands)


def test_what_stock_serves(device: str) -> None:
    """Sums alone, scales of several dimensions, of one element or of samples, residuals that broadcast; and errors."""
    x = random_tensor((3, 4, 5), torch.float32, device)
    for residual, scale in (
        (x, None),
        (x, x[0]),
        (x[:1], x[0, 0]),
        (None, x[:, :1, :1]),
        (x, x[0, 0, :1]),
        (2.0, None),
    ):
        expected = (x if scale is None else x * scale) + (0 if residual is None else residual)
        torch.testing.assert_close(block_end(x, residual, scale), expected)
    torch.testing.assert_close(block_end(x, x, p=1.0), x)
    torch.testing.assert_close(block_end(x, x, x[0, 0], 0.9, training=False), x * x[0, 0] + x)
    samples_inside = x.transpose(0, 1)
    assert set((block_end(samples_inside, p=0.5) / samples_inside).amax((1, 2)).tolist()) <= {0.0, 2.0}
    with pytest.raises(ValueError, match="mode"):
        block_end(x, p=0.5, mode="column")
    with pytest.raises(ValueError, match="probability"):
        block_end(x, p=1.5)
