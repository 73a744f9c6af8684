"""`fusednn.recompute`: copies of results in another layout or dtype are made again, with the same bits."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusednn
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
