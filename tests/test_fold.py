"""Folding batch norms: the same values in evaluation, and nothing folded that isn't safe."""

import copy

import pytest
import torch
from torch import Tensor, nn

import fusednn
from fusednn import layers
from fusednn.layers.replacement.fold import FoldedBatchNorm
from fusednn.testing import random_tensor


def trained(model: nn.Module, *shape: int) -> nn.Module:
    """The model in evaluation, with statistics and parameters of its batch norms unlike those of a new one."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
            for parameter in module.parameters():
                nn.init.uniform_(parameter, -1, 2)
    for seed in range(3):
        model(2 * random_tensor(shape, torch.float32, "cpu", seed) + 1)
    return model.eval()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm1 = layers.BatchNormAct2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.norm2 = layers.BatchNormAct2d(4, activation="gelu")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.norm1(self.conv1(x))), x)


LAYERS_BEFORE = {
    "conv1d": (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), (2, 3, 8)),
    "conv2d": (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), (2, 3, 8, 8)),
    "conv2d, grouped": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6, affine=False), (2, 4, 8, 8)),
    "conv3d": (nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4), (2, 3, 4, 4, 4)),
    "transposed": (nn.ConvTranspose1d(3, 4, 3), nn.BatchNorm1d(4), (2, 3, 8)),
    "transposed, grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 8, 8)),
    "linear": (nn.Linear(3, 4), nn.BatchNorm1d(4), (5, 3)),
    "linear without bias": (nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), (5, 3)),
}


@pytest.mark.parametrize("name", LAYERS_BEFORE)
def test_values_stay(name: str, device: str) -> None:
    before, norm, shape = LAYERS_BEFORE[name]
    model = trained(nn.Sequential(copy.deepcopy(before), copy.deepcopy(norm), nn.ReLU()), *shape).to(device)
    x = random_tensor(shape, torch.float32, device, seed=9)
    expected = model(x)
    report = layers.fold_batch_norm(model)
    assert [row.replaced for row in report.rows] == [True]
    assert isinstance(model[1], FoldedBatchNorm)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_fused_forms_keep_activation_and_residual(device: str) -> None:
    model = trained(nn.Sequential(Block(), Block()), 2, 4, 6, 6).to(device)
    x = random_tensor((2, 4, 6, 6), torch.float32, device, seed=9)
    expected = model(x)
    assert len(layers.fold_batch_norm(model).replaced) == 4
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_replaced_layers_fold(device: str) -> None:
    model = trained(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), 2, 1, 6, 6).to(device)
    fusednn.replace_layers(model)
    assert len(layers.fold_batch_norm(model).replaced) == 1


class Branching(nn.Module):
    """Code that can't be traced, around a part that can."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.outer = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x)) if x.sum() > 0 else self.inner(x)


def test_parts_of_what_cannot_be_traced(device: str) -> None:
    model = trained(Branching(), 5, 3).to(device)
    report = layers.fold_batch_norm(model)
    assert {row.names[0]: row.replaced for row in report.rows} == {"inner.1": True, "outer": False}
    assert "can't be traced" in report.left[0].reason


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class Again(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.conv(x)))


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    model[0].register_forward_hook(lambda *_: None)
    return model


def parametrized() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 1)), nn.BatchNorm2d(2))


def shared() -> nn.Module:
    conv = nn.Conv2d(2, 2, 1)
    return nn.Sequential(conv, nn.BatchNorm2d(2), nn.Sequential(conv))


def untracked() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False))


_APART = "not preceded by a convolution or linear layer"


@pytest.mark.whole
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Twice, "more than once"),
        (Again, "more than once"),
        (hooked, "has hooks"),
        (parametrized, _APART),
        (shared, "shared"),
        (
            lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.BatchNorm2d(2)),
            "not preceded by a convolution or linear layer",
        ),
        (lambda: nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)), _APART),
        (
            lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)),
            "has no running statistics",
        ),
        (lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm2d(2)), "another number of channels"),
    ],
)
def test_what_is_left_and_why(make: object, reason: str, device: str) -> None:
    model = trained(make(), 2, 2, 4, 4).to(device)
    x = random_tensor((2, 2, 4, 4), torch.float32, device, seed=9)
    expected = model(x)
    report = layers.fold_batch_norm(model)
    assert not report.replaced
    assert reason in report.left[0].reason
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_a_norm_whose_batch_norm_is_another_layer_is_left() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), layers.BatchNormAct2d(2), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)).eval()
    model[1].bn = nn.InstanceNorm2d(2)
    report = layers.fold_batch_norm(model)
    assert report.left[0].reason == "another layer has taken its batch norm's place"
    assert [row.names for row in report.replaced] == [("3",)]


def test_training_layers_are_left() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert layers.fold_batch_norm(model).left[0].reason == "in training"


def test_a_linear_layer_before_another_dimension_of_channels_raises(device: str) -> None:
    """On (N, L, C) batch norm would take L for the channels."""
    model = trained(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), 5, 3).to(device)
    layers.fold_batch_norm(model)
    with pytest.raises(ValueError, match="expected 2D input"):
        model(torch.ones(2, 4, 3, device=device))


def test_frozen_parameters_stay_frozen() -> None:
    model = trained(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), 5, 3).requires_grad_(False)
    layers.fold_batch_norm(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


class Activating(nn.BatchNorm2d):
    """As libraries derive it: batch norm, and more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def test_batch_norms_that_do_more_are_left(device: str) -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), Activating(4)), 2, 3, 8, 8).to(device)
    x = random_tensor((2, 3, 8, 8), torch.float32, device)
    expected = model(x)
    assert layers.fold_batch_norm(model).rows[0].reason == "has a forward of its own"
    torch.testing.assert_close(model(x), expected)
