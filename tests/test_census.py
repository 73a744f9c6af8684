"""`fusednn.census`: what a model keeps for its backward pass, by layer, and what would keep less."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusednn
from fusednn.instruments.saved_tensors import saved_tensors


class Network(nn.Module):
    """An activation that its code calls, between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.pool = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.MaxPool2d(2)
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(36, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.drop(self.pool(F.silu(self.norm(self.first(x)))).flatten(1)))
        return y


@pytest.fixture
def x(device: str) -> Tensor:
    return torch.randn(2, 2, 8, 8, device=device)


@pytest.fixture
def model(device: str) -> nn.Module:
    return Network().to(device)


def test_it_is_what_autograd_saves_the_largest_first(model: nn.Module, x: Tensor) -> None:
    census = fusednn.census(model, x)
    with saved_tensors() as saved:
        model(x)
    # On a GPU dropout keeps booleans, on a CPU factors.
    assert census.bytes == saved.bytes_beside(x, *model.parameters(), *model.buffers()) - 3 * 36 * 2 * (not x.is_cuda)
    sizes = [row.bytes for row in census]
    assert sizes == sorted(sizes, reverse=True)
    found = {(row.name, row.layer, row.maker): row.bytes for row in census}
    assert found["norm", "BatchNorm2d", "Convolution"] == 2 * 4 * 6 * 6 * 4
    assert found["", "Network", "CudnnBatchNorm" if x.is_cuda else "NativeBatchNorm"] == 2 * 4 * 6 * 6 * 4


def test_it_says_what_would_keep_less_and_what_that_changes(model: nn.Module, x: Tensor) -> None:
    with torch.autocast(x.device.type, torch.bfloat16):
        census = fusednn.census(model, x)
    remedies = {(row.name, row.maker): row.remedy.partition(";")[0] for row in census}
    assert remedies["first", "copy of an input"] == "give the batch in this dtype"
    assert remedies["last", "ToCopy"] == "recast_parameters=True"
    assert remedies["pool", "masks, codes and seeds"] == "replace_layers: a code of bits in place of an index"
    assert remedies["drop", "masks, codes and seeds"] == "replace_layers: a seed or bits in place of bytes"
    assert all(row.remedy.partition("; ")[2] for row in census if row.remedy)
    assert not remedies["norm", "Convolution"]


def test_the_remedies_keep_less(model: nn.Module, x: Tensor) -> None:
    """What the census says would be kept with recompute=True is kept then."""
    stock = fusednn.census(model, x)
    censuses = []
    for recompute in (False, True):
        ours = copy.deepcopy(model)
        fusednn.replace_layers(ours, recompute=recompute)
        censuses.append(fusednn.census(ours, x))
    kept, again = censuses
    assert stock.bytes >= kept.bytes > again.bytes == kept.recomputed
    assert again.recomputed is None
    assert again.made_again > 0
    assert f"{again.bytes} bytes kept for the backward pass, {again.made_again} made again" in str(again)


def test_it_leaves_no_trace(model: nn.Module, x: Tensor) -> None:
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    fusednn.census(model, x)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        assert fusednn.census(model, x).bytes > 0
