"""Every pointer of every kernel one element behind a multiple of 16 bytes, and every alignment of its extents.

Layouts follow from both, and from layouts who adds what to what: results are the same but for roundings.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from support.launches import Launch, launches
from torch import Tensor

from fusednn import autograd, kernels
from fusednn.autograd.batch_norm_pool import batch_norm_pool
from fusednn.kernels import linear_maxout
from fusednn.kernels.base import long_lines
from fusednn.testing import random_tensor

pytestmark = [pytest.mark.compiled, pytest.mark.thorough]

ROWS, WIDE, IMAGES, CHANNELS = (32, 48), (16, 160), (2, 16, 16, 32), 16


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return random_tensor(shape, dtype, "cpu", seed).requires_grad_()


def last(x: Tensor) -> Tensor:
    """Channels last in memory."""
    return x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()


def norm(x: Tensor, function: Callable[..., Tensor] = autograd.batch_norm, **options: Any) -> Tensor:
    running = torch.zeros(CHANNELS), torch.ones(CHANNELS)
    return function(x, *running, normal(CHANNELS), normal(CHANNELS, seed=1), True, **options)


def convolution(**options: Any) -> Tensor:
    x, weight = last(normal(*IMAGES, dtype=torch.float16)), last(normal(32, CHANNELS, 3, 3, dtype=torch.float16))
    with torch.no_grad():  # cuDNN's
        return autograd.conv_act_pool2d(x, weight, normal(32, dtype=torch.float16), padding=1, **options)


IN_BOTH_ORDERS = {"": lambda x: x, " in channels_last": last}
CALLS: dict[str, Callable[[], Tensor]] = {
    **{name: partial(lambda function: function(normal(*ROWS)), getattr(autograd, name)) for name in ("relu", "gelu")},
    "rrelu": lambda: autograd.rrelu(normal(*ROWS), training=True),
    "dropout": lambda: autograd.dropout(normal(*ROWS)),
    "standout": lambda: autograd.standout(normal(*ROWS), normal(*ROWS, seed=1)),
    "gated": lambda: autograd.gated(normal(*ROWS), normal(*ROWS, seed=1)),
    "gated_halves": lambda: autograd.gated_halves(normal(*ROWS)),
    "highway": lambda: autograd.highway(*(normal(*ROWS, seed=seed) for seed in range(3))),
    "bias_activation_dropout": lambda: autograd.bias_activation_dropout(
        normal(*ROWS), normal(48), normal(*ROWS, seed=1), activation="gelu", p=0.5, training=True
    ),
    "block_end": lambda: autograd.block_end(normal(*ROWS), normal(*ROWS, seed=1), normal(48), p=0.5, training=True),
    "maxout": lambda: autograd.maxout(normal(*ROWS), 2),
    "maxout of channels": lambda: autograd.maxout(normal(*IMAGES), 2, 1),
    "maxout_linear": lambda: autograd.maxout_linear(
        normal(64, 32, dtype=torch.float16), normal(2, 16, 32, dtype=torch.float16), normal(2, 16, dtype=torch.float16)
    ),
    # Lines.
    "softmax": lambda: autograd.softmax(normal(*WIDE), 1),
    "softmax of columns": lambda: autograd.softmax(normal(*WIDE), 0),
    "softmax of long lines": lambda: autograd.softmax(normal(2, 16000), 1),
    "log_softmax of long lines": lambda: autograd.log_softmax(normal(2, 16000), 1),
    "cross_entropy": lambda: autograd.cross_entropy(normal(*WIDE), torch.arange(16), normal(160).detach().abs()),
    "cross_entropy of each": lambda: autograd.cross_entropy(normal(*WIDE), torch.arange(16), reduction="none"),
    "cross_entropy of places": lambda: autograd.cross_entropy(normal(2, 48, 32), torch.arange(64).view(2, 32) % 48),
    "cross_entropy of probabilities": lambda: autograd.cross_entropy(normal(*WIDE), normal(*WIDE, seed=1).softmax(1)),
    "cross_entropy of long lines": lambda: autograd.cross_entropy(normal(2, 16000), torch.tensor([3, 15999])),
    "nll_loss": lambda: autograd.nll_loss(normal(*WIDE), torch.arange(16), normal(160).detach()),
    "nll_loss of each": lambda: autograd.nll_loss(normal(*WIDE), torch.arange(16), reduction="none"),
    "mse_loss": lambda: autograd.mse_loss(normal(*ROWS), normal(*ROWS, seed=1)),
    "mse_loss of each": lambda: autograd.mse_loss(normal(*ROWS), normal(*ROWS, seed=1), reduction="none"),
    # Channels.
    **{
        f"{name}{order}": partial(lambda call, arrange: call(arrange(normal(*IMAGES))), call, arrange)
        for order, arrange in IN_BOTH_ORDERS.items()
        for name, call in {
            "batch_norm": norm,
            "batch_norm_act": lambda x: norm(x, autograd.batch_norm_act, activation="relu", residual=x.detach() / 2),
            "batch_norm_pool": lambda x: norm(
                x,
                lambda *given, **options: batch_norm_pool(*given, 0.1, 1e-5, **options),
                maximum=True,
                activation="relu",
            ),
            "channel_statistics": lambda x: autograd.channel_statistics(x)[0],
            "dropout2d": autograd.dropout2d,
            "gated_channels": lambda x: autograd.gated_channels(x, normal(2, CHANNELS, 1, 1)),
            "max_pool2d": lambda x: autograd.max_pool2d(x, 2),
            "max_pool2d of overlapping windows": lambda x: autograd.max_pool2d(x, 3, 1, 1),
            "prelu": lambda x: autograd.prelu(x, normal(CHANNELS)),
        }.items()
    },
    "conv_act_pool2d": lambda: convolution(pool_size=2),
    "conv_act_pool2d without pooling": convolution,
}


def launched(call: Callable[[], Tensor]) -> list[Launch]:
    """By the call and its gradient; lines of thousands count as long, and few programs as enough."""
    long = mock.patch.multiple(long_lines, _SHARED_FROM=8000, _SPLIT=1)
    with long, mock.patch.object(linear_maxout, "_ENOUGH_PROGRAMS", 1), launches() as found:
        y = call()
        if y.requires_grad:
            y.backward(torch.ones_like(y))
    return found


def assert_alike(expected: dict[str, Tensor], results: dict[str, Tensor], what: str) -> None:
    for name, result in results.items():
        torch.testing.assert_close(
            result, expected[name], equal_nan=True, msg=lambda text, name=name: f"{name}, {what}: {text}"
        )


@pytest.mark.parametrize("name", CALLS)
def test_each_pointer_may_be_unaligned(name: str) -> None:
    for launch in launched(CALLS[name]):
        expected = launch.again()
        for pointer in expected:
            assert_alike(expected, launch.again(unaligned=[pointer]), f"{pointer} unaligned")


@pytest.mark.parametrize("name", CALLS)
def test_extents_may_be_less_aligned(name: str) -> None:
    for launch in launched(CALLS[name]):
        if not launch.configuration.aligned:
            continue
        assert launch.alignment == dict(launch.configuration.constants)["ALIGN"]
        expected = launch.again()
        for variant in launch.configuration.variants:
            assert_alike(expected, launch._replace(configuration=variant).again(), variant.label)


def test_no_kernel_is_missing() -> None:
    """Optimizers' find their tensors through addresses."""
    names = {launch.configuration.kernel.__name__ for call in CALLS.values() for launch in launched(call)}
    shipped = {each.kernel.__name__ for each in kernels.shipped()}
    assert shipped - names == {"optimizer_update_kernel", "optimizer_squares_kernel"}


def test_a_promise_that_is_broken_shows() -> None:
    """Lines of 40 that the kernel is told are a multiple of 16."""
    launch, _ = launched(lambda: autograd.softmax(normal(16, 40), 1))
    assert launch.alignment == 8
    broken = launch._replace(configuration=replace(launch.configuration, aligned=()))
    with pytest.raises(AssertionError, match="y_pointer, broken"):
        assert_alike(launch.again(), broken.again(), "broken")
