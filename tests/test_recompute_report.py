"""What `replace_layers` and `explain` say of results that are made again in the backward pass."""

import pytest
import torch
from support.operations import OPERATIONS, Operation
from torch import Tensor, nn

import fusednn
from fusednn.autograd.recompute import observe_saved
from fusednn.layers.replacement.kept import ANYWAY, KEPT, OF_PRODUCT, WHERE_KEPT

# --- The report -------------------------------------------------------------------------------------------------------


def is_made_again(model: nn.Module, x: Tensor, *, kept: bool) -> bool:
    """Whether a product keeps what it is given of the model's result, whose input somebody else keeps or not."""
    saved: list[tuple[int, bool]] = []
    factor = torch.full_like(x, 1.5, requires_grad=True)
    with fusednn.recompute(model), observe_saved(lambda tensor, again: saved.append((tensor.data_ptr(), again))):
        start = x + factor
        elsewhere = start * factor if kept else start
        y = model(start)
        y * torch.ones_like(y, requires_grad=True)
    del elsewhere
    return (y.data_ptr(), True) in saved


def says(model: nn.Sequential) -> str | None:
    """Of the first layer, in a report of the model with its neighbours fused."""
    return fusednn.replace_layers(model, fuse=True, recompute=True).rows[0].computed


_LAYERS = [name for name in OPERATIONS if hasattr(nn, name) and not name.endswith("Loss")]


@pytest.mark.kernels
@pytest.mark.parametrize("name", _LAYERS)
def test_the_report_says_what_becomes_of_each_layer(name: str) -> None:
    operation = Operation(name, torch.float32)
    x = operation.leaves()[0].detach()
    said = says(nn.Sequential(operation.ours))
    expected = {ANYWAY: (True, True), WHERE_KEPT: (True, False), KEPT: (False, False)}
    found = tuple(is_made_again(operation.ours, x, kept=kept) for kept in (True, False))
    assert found == expected[said or KEPT]


_IMAGES, _ROWS = (2, 2, 4, 4), (3, 4)


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("layers", "shape", "said"),
    [
        ((nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2)), _IMAGES, OF_PRODUCT),
        ((nn.Conv2d(2, 2, 3), nn.ReLU(), nn.MaxPool2d(2)), _IMAGES, KEPT),
        ((nn.BatchNorm2d(2), nn.ReLU()), _IMAGES, ANYWAY),
        ((nn.Conv2d(2, 2, 3), nn.GELU()), _IMAGES, OF_PRODUCT),
        ((nn.ConvTranspose2d(2, 2, 3), nn.SiLU(inplace=True)), _IMAGES, OF_PRODUCT),
        ((nn.Conv2d(2, 2, 3), nn.GELU(), nn.MaxPool2d(2)), _IMAGES, OF_PRODUCT),
        ((nn.Conv2d(2, 2, 3), nn.Tanh(), nn.MaxPool2d(2)), _IMAGES, OF_PRODUCT),
        ((nn.Conv2d(2, 2, 3), nn.Tanh()), _IMAGES, KEPT),
        ((nn.GELU(), nn.MaxPool2d(2)), _IMAGES, ANYWAY),
        ((nn.ReLU(), nn.MaxPool2d(2)), _IMAGES, WHERE_KEPT),
        ((nn.Linear(4, 4), nn.GELU()), _ROWS, OF_PRODUCT),
        ((nn.Linear(4, 4), nn.ReLU(), nn.Dropout()), _ROWS, KEPT),
    ],
)
def test_the_report_says_what_becomes_of_neighbours(
    layers: tuple[nn.Module, ...], shape: tuple[int, ...], said: str, device: str
) -> None:
    """Of the first of them; the others' results are nowhere."""
    model = nn.Sequential(*layers).to(device)
    report = fusednn.replace_layers(model, fuse=True, recompute=True)
    assert [row.computed for row in report.rows] == [said, *[None] * (len(layers) - 1)]
    assert said in str(report)
    fusednn.restore_layers(model)
    fusednn.replace_layers(model, fuse=True)
    assert is_made_again(model, torch.randn(shape, device=device), kept=said == WHERE_KEPT) == (said != KEPT)


def test_the_report_says_nothing_where_that_was_not_asked_for() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.GELU())
    report = fusednn.replace_layers(model, fuse=True)
    assert all(row.computed is None for row in report.rows)
    assert "what it computes" not in str(report)
    left = fusednn.replace_layers(nn.Sequential(nn.BatchNorm1d(2), nn.LayerNorm(2)), include="nothing", recompute=True)
    assert [row.computed for row in left.rows] == [None, ANYWAY]


def test_a_single_layer_is_left(device: str) -> None:
    report = fusednn.replace_layers(nn.GELU(), recompute=True)
    assert report.recompute == "no: a single layer"


# --- The explanation --------------------------------------------------------------------------------------------------


def test_explain_says_what_is_kept(device: str) -> None:
    """By layer: of a replaced model, whose results are made again, and of no other."""
    layers = [nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4), nn.LayerNorm(4, eps=1e-3), nn.Linear(4, 4), nn.Tanh()]
    model, x = nn.Sequential(*layers).to(device), torch.randn(3, 4, device=device)
    fusednn.replace_layers(model)
    assert fusednn.explain(model, x).kept == ()
    fusednn.replace_layers(model, recompute=True)
    explanation = fusednn.explain(model, x)
    assert sum(row.kept for row in explanation.kept) > 0
    again = {row.name: row.made_again for row in explanation.kept if row.made_again}
    assert again == {"2": 3 * 8 * 4, "4": 3 * 4 * 4}
    assert f"{3 * 12 * 4} made again" in str(explanation)
    assert [row.kept for row in explanation.kept] == sorted((row.kept for row in explanation.kept), reverse=True)
    assert all(parameter.grad is None for parameter in model.parameters())
