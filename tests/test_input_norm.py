"""Normalisation of inputs: streaming statistics of a training set, and contrast of each example."""

import copy
import pickle

import pytest
import torch
from support.device import FLOAT_DTYPES, KERNELS_RUN
from torch import Tensor

from fusednn import layers
from fusednn.autograd.dispatch import observe_choices
from fusednn.testing import LAYOUTS, random_tensor


@pytest.mark.parametrize("shape", [(20, 5), (20, 5, 3, 4)], ids=str)
def test_fit_in_batches_of_any_size(shape: tuple[int, ...], device: str) -> None:
    data = 100 + random_tensor(shape, torch.float32, device)
    others = [dim for dim in range(data.dim()) if dim != 1]
    variance, mean = torch.var_mean(data.double(), others, correction=0)
    whole = layers.InputNorm(5).to(device).fit(data)
    streamed = layers.InputNorm(5).to(device).fit(iter(data.split([1, 7, 10, 2])))
    for layer in (whole, streamed):
        torch.testing.assert_close(layer.mean.double(), mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(layer.variance.double(), variance, rtol=1e-5, atol=0)
        assert layer.count == data.numel() // 5
        y = layer(data)
        torch.testing.assert_close(y.mean(others), torch.zeros(5, device=device), rtol=0, atol=1e-4)
        torch.testing.assert_close(y.std(others, correction=0), torch.ones(5, device=device), rtol=1e-4, atol=0)


def test_frozen_after_fit(device: str) -> None:
    layer = layers.InputNorm(3).to(device).fit(random_tensor((50, 3), torch.float32, device))
    before = copy.deepcopy(layer.state_dict())
    layer.train()(random_tensor((7, 3), torch.float32, device, seed=1))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert not list(layer.parameters())
    for duplicate in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert all(torch.equal(value, before[name]) for name, value in duplicate.state_dict().items())
    layer.fit(torch.ones(2, 3, device=device))
    assert layer.count == 2
    assert (layer(torch.ones(4, 3, device=device)) == 0).all(), "constant features become 0"


def test_unfitted_it_changes_almost_nothing(device: str) -> None:
    x = random_tensor((4, 3), torch.float32, device)
    torch.testing.assert_close(layers.InputNorm(3).to(device)(x), x, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_dtypes_and_gradients(dtype: torch.dtype, device: str) -> None:
    layer = layers.InputNorm(3).to(device).fit(random_tensor((50, 3), torch.float32, device))
    x = random_tensor((4, 3), dtype, device).requires_grad_()
    choices = []
    with observe_choices(choices.append):
        y = layer(x)
    assert y.dtype == dtype
    assert [choice.path for choice in choices] == ["kernel" if KERNELS_RUN else "stock"]
    (gradient,) = torch.autograd.grad(y.sum(), x)
    slopes = 1 / (layer.variance + layer.eps).sqrt()
    torch.testing.assert_close(gradient.float(), slopes.expand(4, 3), rtol=1e-2, atol=1e-3)


def test_wrong_inputs(device: str) -> None:
    layer = layers.InputNorm(3).to(device)
    for wrong in (torch.ones(3, device=device), torch.ones(2, 4, device=device)):
        with pytest.raises(ValueError, match=r"expected input \(N, 3, \*\)"):
            layer(wrong)
        with pytest.raises(ValueError, match=r"expected input \(N, 3, \*\)"):
            layer.fit(wrong)
    with pytest.raises(TypeError, match=r"floating-point batch, got torch\.int64"):
        layer.fit(torch.ones(2, 3, dtype=torch.int64, device=device))
    for nothing in ([], torch.ones(0, 3, device=device), [torch.ones(2, 3, 0, device=device)]):
        with pytest.raises(ValueError, match="at least one example"):
            layer.fit(nothing)
    with pytest.raises(ValueError, match="at least one example"):
        layers.InputNorm(0).to(device).fit(torch.ones(2, 0, device=device))


def test_empty_batches_are_passed_over(device: str) -> None:
    layer, x = layers.InputNorm(3).to(device), random_tensor((4, 3), torch.float32, device)
    layer.fit([x[:0], x[:1], x[1:1], x[1:]])
    assert layer.count == 4
    torch.testing.assert_close(layer.mean, x.mean(0))
    torch.testing.assert_close(layer.variance, x.var(0, correction=0))
    assert layer(x[:0]).shape == (0, 3)


def contrast(x: Tensor, scale: float, eps: float) -> Tensor:
    rows = x.double().flatten(1)
    variance, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
    return (scale * (rows - mean) / (variance + eps).sqrt()).view(x.shape)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_global_contrast(scale: float, layout: str, device: str) -> None:
    x = LAYOUTS[layout](10 + random_tensor((3, 6, 5, 4), torch.float32, device)).requires_grad_()
    layer = layers.GlobalContrastNorm(scale, eps=1e-3)
    y = layer(x)
    if layout != "scalar":
        torch.testing.assert_close(y.double(), contrast(x, scale, 1e-3), rtol=1e-5, atol=1e-4)
    assert y.shape == x.shape
    if layout in ("contiguous", "channels_last"):
        assert y.stride() == x.stride()
    gradient = random_tensor((3, 6, 5, 4), torch.float32, device, seed=1)
    ours = torch.autograd.grad(y, x, gradient)
    theirs = torch.autograd.grad(contrast(x, scale, 1e-3), x, gradient.double())
    if layout != "scalar":  # an expanded input's gradients differ in how they are spread over the repeats
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_examples_without_contrast_become_zero(device: str) -> None:
    assert (layers.GlobalContrastNorm()(torch.full((2, 3, 4), 7.0, device=device)) == 0).all()
    with pytest.raises(ValueError, match="expected input"):
        layers.GlobalContrastNorm()(torch.ones(3, device=device))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_examples_of_few_elements(scale: float, device: str) -> None:
    layer = layers.GlobalContrastNorm(scale).to(device)
    x = torch.tensor([[1.0, 2.0, 3.0]], device=device)
    torch.testing.assert_close(layer(x).double(), contrast(x, scale, layer.eps))
    for shape in ((0, 3), (2, 0), (0, 0)):
        assert layer(torch.ones(shape, device=device)).shape == shape
    for shape in ((1, 1), (2, 1, 1)):
        with pytest.raises(ValueError, match="more than one element an example"):
            layer(torch.ones(shape, device=device))
