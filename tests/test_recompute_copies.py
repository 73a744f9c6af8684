"""`fusednn.recompute`: what is made again beside results: copies of them, and what their own gradient needs."""

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fusednn
from fusednn.autograd import conv_batch_norm
from fusednn.autograd.recompute import observe_saved
from fusednn.instruments.saved_tensors import saved_tensors
from fusednn.testing import assert_same_bits


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert_same_bits(mine, other, "made again")


_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda y: y.transpose(-1, 0),
    "permuted": lambda y: y.permute(-1, 0, 1),
    "transposed and reshaped": lambda y: y.transpose(0, 1).reshape(-1, 4),
    "unsqueezed and squeezed": lambda y: y.unsqueeze(0).transpose(0, -2).squeeze(-2),
    "viewed": lambda y: y.view(3, 2, 2, 4).transpose(0, 1),
    "copied once more": lambda y: y.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("view", _VIEWS)
@pytest.mark.parametrize("changed", [False, True], ids=["as it was", "changed"])
def test_contiguous_copies(changed: bool, view: str, device: str) -> None:
    """Of a norm's result, which nobody saves but by its copy: not where it was changed in between."""
    norm = nn.LayerNorm(4, eps=1e-3).to(device)
    weight = torch.full((4, 4), 0.5, device=device, requires_grad=True)
    x = torch.randn(3, 4, 4, device=device)

    def run(context: Any) -> tuple[list[Tensor], bool]:
        saved: list[tuple[int, bool]] = []
        with context(), observe_saved(lambda tensor, again: saved.append((tensor.data_ptr(), again))):
            y = norm(x @ weight)
            if changed:
                with torch.no_grad():
                    y += 1
            copied = _VIEWS[view](y).contiguous()
            z = copied * weight.sum()
        again = (copied.data_ptr(), True) in saved
        return list(torch.autograd.grad(z.square().sum(), [weight, *norm.parameters()])), again

    expected, _ = run(contextlib.nullcontext)
    found, again = run(lambda: fusednn.recompute(norm))
    assert_same(found, expected)
    assert again == (not changed and view != "copied once more")


def test_copies_of_autocast(device: str) -> None:
    """Of a norm's result, in another dtype; of parameters only where that is asked for."""
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 4)).to(device)
    x = torch.randn(3, 4, device=device)

    def run(context: Any) -> tuple[list[Tensor], int]:
        with saved_tensors() as census, torch.autocast(device, torch.bfloat16), context():
            y = model(x)
        kept = census.bytes_beside(x, *model.parameters())
        return list(torch.autograd.grad(y.float().square().sum(), list(model.parameters()))), kept

    expected, most = run(contextlib.nullcontext)
    found, fewer = run(lambda: fusednn.recompute(model))
    assert_same(found, expected)
    assert fewer < most
    found, fewest = run(lambda: fusednn.recompute(model, recast_parameters=True))
    assert_same(found, expected)
    assert fewer - fewest == sum(2 * layer.weight.numel() for layer in (model[2], model[4]))


@pytest.mark.kernels
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU()], ids=["codes", "codes and maxima"])
def test_what_pooling_keeps(activation: nn.Module, device: str) -> None:
    """With the result where a consumer asks for that first; by itself where none does; in every pass anew."""
    layers = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), activation, nn.MaxPool2d(2), nn.Conv2d(3, 2, 2)]
    model = nn.Sequential(*layers).to(device)
    fusednn.replace_layers(model, fuse=True)
    x = torch.randn(2, 2, 8, 8, device=device)
    norm, last = list(model[1].parameters()), list(model[4].parameters())

    def run(context: Any, *wanted: list[nn.Parameter]) -> tuple[list[Tensor], int, int]:
        with saved_tensors() as census, context():
            y = model(x).square().sum()
        kept = census.bytes_beside(x, *model.parameters(), *model.buffers())
        found: list[Tensor] = []
        with mock.patch.object(conv_batch_norm, "_forward", wraps=conv_batch_norm._forward) as forward:
            for parameters in wanted:
                found += torch.autograd.grad(y, parameters, retain_graph=True)
        return found, kept, forward.call_count

    every = [*norm, *last]
    expected, most, _ = run(contextlib.nullcontext, every, last, norm)
    found, least, forwards = run(lambda: fusednn.recompute(model), every, last, norm)
    assert_same(found, expected)
    pooled, rows = 2 * 3 * 3 * 3 * 4, 2 * 3 * 3  # bytes of the result, and rows of three codes, in 2 or 1 bytes
    assert most - least == (pooled + 2 * rows if isinstance(activation, nn.ReLU) else 2 * pooled + rows)
    assert forwards == 3


_CONVOLUTIONS: dict[str, list[nn.Module]] = {
    "convolution": [nn.Conv2d(3, 4, 3), nn.GELU()],
    "single kernel": [nn.Conv2d(16, 4, 1), nn.SiLU(), nn.MaxPool2d(2)],
    "pooled": [nn.Conv2d(3, 4, 3), nn.Tanh(), nn.MaxPool2d(3, 2, 1)],
    "of sounds": [nn.Conv1d(3, 4, 3), nn.Mish()],
    "transposed": [nn.ConvTranspose3d(3, 4, 2), nn.Softplus()],
}


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", _CONVOLUTIONS)
def test_activations_of_convolutions(name: str, dtype: torch.dtype, device: str) -> None:
    """Are made again of what is kept before them, as it is rounded."""
    first, *rest = _CONVOLUTIONS[name]
    directions = int(type(first).__name__[-2])
    last = getattr(nn, f"Conv{directions}d")(4, 2, 1)
    model = nn.Sequential(first, *rest, last).to(device, dtype)
    x = torch.randn((2, first.in_channels, *[5] * directions), device=device, dtype=dtype)  # type: ignore[arg-type]
    if name == "single kernel":
        x = x.contiguous(memory_format=torch.channels_last)
    fusednn.replace_layers(model, fuse=True)
    sizes, gradients = [], []
    for context in (contextlib.nullcontext, lambda: fusednn.recompute(model)):
        with saved_tensors() as census, context():
            y = model(x).square().sum()
        sizes.append(census.bytes_beside(x, *model.parameters()))
        first_order = torch.autograd.grad(y, list(model.parameters()), create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first_order)
        second_order = torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True)  # type: ignore[arg-type]
        gradients.append([*first_order, *(one for one in second_order if one is not None)])
    assert_same(gradients[1], gradients[0])
    result = model[:-1](x).numel() * dtype.itemsize
    assert sizes[0] - sizes[1] == result
