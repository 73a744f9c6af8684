"""What the tests of recomputation share: a network, its gradients, and what is made again."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from fusednn.autograd.handles import Recipe
from fusednn.testing import assert_same_bits

#: Whose results are kept for themselves, or made of more than is kept: products, losses, bits that were drawn.
KEPT = {
    *("BCELoss", "BCEWithLogitsLoss", "CrossEntropyLoss", "HuberLoss", "KLDivLoss", "L1Loss", "MSELoss", "NLLLoss"),
    *("SmoothL1Loss", "LinearCrossEntropyLoss", "binary_cross_entropy_with_logits", "cross_entropy", "kl_div"),
    *("linear_cross_entropy", "nll_loss", "Sigmoid", "Tanh", "bias_activation_dropout", "standout"),
    *("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"),
    *("conv_act_pool2d", "drop_connect_linear", "maxout", "maxout_conv2d", "maxout_linear"),
    *("channel_statistics", "conv_activation_dropout"),
}


@contextlib.contextmanager
def made_again() -> Iterator[list[Tensor]]:
    """The results that are made again inside the ``with`` block."""
    made: list[Tensor] = []
    make = Recipe._make

    def making(recipe: Recipe, stream: int) -> Tensor:
        made.append(make(recipe, stream))
        return made[-1]

    with mock.patch.object(Recipe, "_make", making):
        yield made


def network(device: str) -> nn.Sequential:
    """Its GELU's result and its norm's can be made again."""
    layers = [nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4), nn.LayerNorm(4, eps=1e-3), nn.Linear(4, 4), nn.Tanh()]
    return nn.Sequential(*layers).to(device)


def gradients(model: nn.Module, x: Tensor, context: Any = contextlib.nullcontext) -> list[Tensor]:
    """Of a pass whose forward part runs in ``context``."""
    torch.manual_seed(1)
    with context():
        y = model(x)
    return list(torch.autograd.grad(y.square().sum(), list(model.parameters())))


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert_same_bits(mine, other, "made again")
