"""Bytes and launches of each kind of neighbours behind its product, forward and backward, held to the budgets."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fusednn
from fusednn import kernels
from fusednn.testing import leaf, random_tensor

pytestmark = [pytest.mark.kernels, pytest.mark.interpreter]

if kernels.INTERPRETING:
    from fusednn.instruments.traffic import measure_traffic

#: Beside the budget: what channels have one of for each program, and what programs leave to the next pass.
SLACK = 1.05
#: An element's bit, in units of its bytes.
BIT = 1 / 32


class Kind(NamedTuple):
    """Neighbours, and in units of the product's bytes what their passes move; launches besides the product's."""

    build: Callable[[], list[nn.Module]]
    shape: tuple[int, ...]
    forward: float
    backward: float
    launches: tuple[int, int]


class Added(nn.Module):
    """A norm, a residual, and what comes behind their sum."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(16), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x) + x.detach().flip(0))


def conv(directions: int, *, bias: bool = True, transposed: bool = False) -> nn.Module:
    name = f"Conv{'Transpose' * transposed}{directions}d"
    product: nn.Module = getattr(nn, name)(16, 16, 1, bias=bias)
    return product


LINE, IMAGE, VOLUME, ROWS = (4, 16, 256), (4, 16, 16, 16), (4, 16, 8, 8, 8), (512, 64)

#: Pooling leaves a code for each window: the place of its maximum, and a bit that tells whether ReLU passes it on.
KINDS: dict[str, Kind] = {
    # Statistics read it, normalisation again; backward the pooling's gradient is spread, then the norm has two passes.
    "Conv1d, BatchNorm1d, ReLU, MaxPool1d": Kind(
        lambda: [conv(1, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(4)],
        LINE,
        *(2 + 1 / 4 + 4 * BIT / 4, 1 / 4 + 4 * BIT / 4 + 1 + 5, (3, 3)),
    ),
    "Conv3d, BatchNorm3d, ReLU, MaxPool3d": Kind(
        lambda: [conv(3, bias=False), nn.BatchNorm3d(16), nn.ReLU(), nn.MaxPool3d(2)],
        VOLUME,
        *(2 + 1 / 8 + 4 * BIT / 8, 1 / 8 + 4 * BIT / 8 + 1 + 5, (3, 3)),
    ),
    "Conv3d, ReLU, MaxPool3d": Kind(
        lambda: [conv(3), nn.ReLU(), nn.MaxPool3d(2)], VOLUME, 1 + 1 / 8 + 4 * BIT / 8, 1 / 8 + 4 * BIT / 8 + 1, (1, 1)
    ),
    "ConvTranspose2d, ReLU": Kind(lambda: [conv(2, transposed=True), nn.ReLU()], IMAGE, 2 + BIT, 2 + BIT, (1, 1)),
    "ConvTranspose3d, BatchNorm3d, ReLU": Kind(
        lambda: [conv(3, bias=False, transposed=True), nn.BatchNorm3d(16), nn.ReLU()], VOLUME, 3, 5, (2, 2)
    ),
    "Conv2d, PReLU": Kind(lambda: [conv(2), nn.PReLU(16)], IMAGE, 2, 3, (1, 1)),
    "Linear, PReLU": Kind(lambda: [nn.Linear(64, 64), nn.PReLU(64)], ROWS, 2, 3, (1, 1)),
    "Conv2d, BatchNorm2d, PReLU": Kind(
        lambda: [conv(2, bias=False), nn.BatchNorm2d(16), nn.PReLU(16)], IMAGE, 3, 5, (2, 2)
    ),
    # The residual is read, and its gradient written, and read by the second pass in the place of the output's.
    "BatchNorm2d, residual, PReLU": Kind(lambda: [conv(2, bias=False), Added(nn.PReLU(16))], IMAGE, 4, 7, (2, 2)),
    "Conv2d, ReLU, BatchNorm2d": Kind(lambda: [conv(2), nn.ReLU(), nn.BatchNorm2d(16)], IMAGE, 3, 5, (2, 2)),
    "Linear, ReLU, BatchNorm1d": Kind(lambda: [nn.Linear(64, 64), nn.ReLU(), nn.BatchNorm1d(64)], ROWS, 3, 5, (2, 2)),
    "Linear, BatchNorm1d, SiLU, Dropout": Kind(
        lambda: [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.SiLU(), nn.Dropout(0.5)], ROWS, 3, 5, (2, 2)
    ),
    "Conv2d, ReLU, Dropout2d": Kind(lambda: [conv(2), nn.ReLU(), nn.Dropout2d(0.5)], IMAGE, 2 + BIT, 2 + BIT, (1, 1)),
    "Conv2d, LeakyReLU(0.2)": Kind(lambda: [conv(2), nn.LeakyReLU(0.2)], IMAGE, 2 + BIT, 2 + BIT, (1, 1)),
    # Its input is kept, as PyTorch keeps it: written beside the result.
    "Conv2d, ELU(0.5)": Kind(lambda: [conv(2), nn.ELU(0.5)], IMAGE, 3, 3, (1, 1)),
    "BatchNorm2d, Hardtanh(0, 6)": Kind(
        lambda: [conv(2, bias=False), nn.BatchNorm2d(16), nn.Hardtanh(0, 6)], IMAGE, 3, 5, (2, 2)
    ),
    # Sums of gradients are over the maxima alone, so the second pass is the only one over the input.
    "Conv1d, BatchNorm1d, ReLU, maximum": Kind(
        lambda: [conv(1, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.AdaptiveMaxPool1d(1)], LINE, 2, 2, (3, 2)
    ),
    "Conv2d, BatchNorm2d, ReLU, mean": Kind(
        lambda: [conv(2, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1)], IMAGE, 2, 3, (3, 2)
    ),
    "Conv2d, SiLU, maximum": Kind(lambda: [conv(2), nn.SiLU(), nn.AdaptiveMaxPool2d(1)], IMAGE, 1, 1, (1, 2)),
    "Conv2d, SiLU, mean": Kind(lambda: [conv(2), nn.SiLU(), nn.AdaptiveAvgPool2d(1)], IMAGE, 1, 2, (1, 1)),
}
#: Whose kernels others of them launch, too.
REPEATED = (
    *("Conv3d, ReLU, MaxPool3d", "Linear, PReLU", "Linear, ReLU, BatchNorm1d", "Conv2d, LeakyReLU(0.2)"),
    *("ConvTranspose3d, BatchNorm3d, ReLU", "BatchNorm2d, Hardtanh(0, 6)", "Conv2d, SiLU, mean"),
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.thorough] * (name in REPEATED)) for name in KINDS]
)
def test_neighbours_keep_their_budget(name: str, device: str) -> None:
    build, shape, ahead, back, launches = KINDS[name]
    torch.manual_seed(0)
    product, *others = build()
    model = nn.Sequential(product, *others).to(device)
    fusednn.replace_layers(model, fuse=True)
    x = leaf(random_tensor(shape, torch.float32, device))
    unit = x.numel() * x.itemsize  # the product's, too
    with measure_traffic() as forward:
        y = model(x)
    gradient = random_tensor(y.shape, torch.float32, device, seed=1)
    with measure_traffic() as backward:
        y.backward(gradient)
    assert ahead <= forward.bytes / unit <= SLACK * ahead
    assert back <= backward.bytes / unit <= SLACK * back
    assert (forward.launches, backward.launches) == launches
