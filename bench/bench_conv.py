"""Convolution + bias + ReLU + max pooling: the stages of AlexNet, VGG-16, LeNet, and ResNet-50's stem.

Also of lines, as networks of text and audio have them, and of volumes.  Channels-last, and NCHW, on both sides.
float32 multiplies by TF32, and without: as allowed for all contestants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fusednn_bench.replay import test_device_time  # noqa: F401 (pytest collects it here)
from torch import Tensor

from fusednn import autograd
from fusednn.autograd.batch_norm_arguments import NormArguments
from fusednn.autograd.conv import conv_act_pool
from fusednn.autograd.conv_batch_norm import conv_batch_norm_act
from fusednn.benchmark.cases import Case, Inputs, Operation
from fusednn.benchmark.protocol import WrongResultError

SIZES = {"batch_32": 32, "batch_256": 256, "batch_1": 1}
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


@dataclass(frozen=True)
class Stage:
    """A convolution of images (channels, size, size), or in other ``directions`` than two, and the pooling."""

    channels: int
    size: int
    filters: int
    kernel: int
    stride: int = 1
    padding: int = 0
    pool: tuple[int, int, int] = (2, 2, 0)  # size, stride, padding
    directions: int = 2

    @property
    def memory_format(self) -> torch.memory_format:
        """That in which channels are last, if there is one."""
        return {2: torch.channels_last, 3: torch.channels_last_3d}.get(self.directions, torch.contiguous_format)

    @property
    def dense(self) -> int:
        """Height and width of the convolution's result."""
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def pooled(self) -> int:
        size, stride, padding = self.pool
        return (self.dense + 2 * padding - size) // stride + 1

    def output_shape(self, shape: torch.Size) -> Sequence[int]:
        return shape[0], self.filters, *[self.pooled] * self.directions

    def operands(self, x: Tensor) -> tuple[Tensor, ...]:
        """The images, filters that keep their deviation, and a bias."""
        generator = torch.Generator(x.device).manual_seed(0)
        options: dict[str, Any] = {"generator": generator, "device": x.device, "dtype": torch.float32}
        depth = self.channels * self.kernel**self.directions
        sizes = [self.kernel] * self.directions
        weight = torch.randn((self.filters, self.channels, *sizes), **options) / depth**0.5
        bias = torch.randn(self.filters, **options)
        if not x.is_contiguous():
            weight = weight.contiguous(memory_format=self.memory_format)
        return tuple(t.to(x.dtype).requires_grad_() for t in (x, weight, bias))

    def budget(self, shape: torch.Size, dtype: torch.dtype) -> tuple[float, float]:
        """Forward input, weights, pooled result and code; backward these, the dense gradient, written and read twice by
        cuDNN, and the gradients.
        """
        images, weights = shape.numel(), self.filters * (self.channels * self.kernel**self.directions + 1)
        pooled = shape[0] * self.filters * self.pooled**self.directions
        dense = shape[0] * self.filters * self.dense**self.directions
        code = pooled * (0.5 if self.pool[0] == 2 else 1)
        forward = (images + weights + pooled) * dtype.itemsize + code
        return forward, forward + (3 * dense + images + weights) * dtype.itemsize

    def ours(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        size, stride, padding = self.pool
        return conv_act_pool(
            *(self.directions, x, weight, bias, self.stride, self.padding, 1, 1, None),
            activation="relu",
            activation_parameters=(),
            pool_size=size,
            pool_stride=stride,
            pool_padding=padding,
        )

    def stock(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = self.convolved(x, weight, bias)
        return self.max_pooled(F.relu(y, inplace=True))

    def convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _CONVOLUTIONS[self.directions](x, weight, bias, self.stride, self.padding)

    def max_pooled(self, y: Tensor) -> Tensor:
        return _POOLINGS[self.directions](y, *self.pool)


#: By the number of directions.
_CONVOLUTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_POOLINGS: dict[int, Any] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


STAGES = {
    "vgg_early": Stage(3, 224, 64, 3, padding=1),
    "vgg_middle": Stage(128, 56, 256, 3, padding=1),
    "vgg16_1": Stage(64, 224, 64, 3, padding=1),
    "vgg16_2": Stage(128, 112, 128, 3, padding=1),
    "vgg16_3": Stage(256, 56, 256, 3, padding=1),
    "vgg16_4": Stage(512, 28, 512, 3, padding=1),
    "vgg16_5": Stage(512, 14, 512, 3, padding=1),
    "alexnet_1": Stage(3, 224, 64, 11, 4, 2, (3, 2, 0)),
    "alexnet_2": Stage(64, 27, 192, 5, padding=2, pool=(3, 2, 0)),
    "alexnet_5": Stage(256, 13, 256, 3, padding=1, pool=(3, 2, 0)),
    "lenet_1": Stage(1, 28, 6, 5, padding=2),
    "lenet_2": Stage(6, 14, 16, 5),
    "resnet50_stem": Stage(3, 224, 64, 7, 2, 3, (3, 2, 1)),
}
QUICK = ("vgg_early", "vgg_middle", "alexnet_1", "lenet_2", "resnet50_stem")


def _check(case: Case, y: Tensor, gradients: Sequence[Tensor], inputs: Inputs) -> float:
    """Windows whose two largest elements are a rounding apart may give their gradient to either: so gradients are
    compared by their norms, and the value element by element.
    """
    exact = inputs.upcast()
    graph = case.operation.stock(*exact.operands)
    reference = graph.detach()
    epsilon = 2.0**-11 if case.dtype is torch.float32 else torch.finfo(case.dtype).eps  # TF32, where it is allowed
    error = float(((y.detach().double() - reference).abs() / (1 + reference.abs())).max()) / epsilon
    expected = torch.autograd.grad(graph, exact.differentiable, exact.g)
    apart = max(float((g.double() - e).norm() / e.norm()) for g, e in zip(gradients, expected, strict=True))
    if not (error <= 8 and apart <= 0.2):
        raise WrongResultError(f"{case.id}: value {error:.3g} epsilons, gradients {apart:.1%} from eager PyTorch's")
    return error


def staged(
    name: str, stage: Stage, memory_format: torch.memory_format | None = None, tf32: bool | None = True
) -> Operation:
    return Operation(
        name,
        "conv",
        stage.ours,
        stage.stock,
        stage.budget,
        operands=stage.operands,
        output_shape=stage.output_shape,
        memory_format=memory_format or stage.memory_format,
        check=_check,
        tf32=tf32,
    )


class NormalisedStage(Stage):
    """With batch norm in training before the activation."""

    def operands(self, x: Tensor) -> tuple[Tensor, ...]:
        """The images, filters, and batch norm's weight and bias."""
        x, weight, bias = super().operands(x)
        return x, weight, torch.ones_like(bias).requires_grad_(), bias

    def budget(self, shape: torch.Size, dtype: torch.dtype) -> tuple[float, float]:
        """Besides, the convolution's result is written and read twice, and read three times backward."""
        forward, backward = super().budget(shape, dtype)
        dense = shape[0] * self.filters * self.dense**self.directions * dtype.itemsize
        return forward + 3 * dense, backward + 4 * dense

    def ours(self, x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:  # type: ignore[override]
        size, stride, padding = self.pool
        return conv_batch_norm_act(
            *(self.directions, x, weight, None, NormArguments(None, None, norm_weight, norm_bias, True, 0.1, 1e-5)),
            *(self.stride, self.padding, 1, 1, None),
            residual=None,
            activation="relu",
            activation_parameters=(),
            pool_size=size,
            pool_stride=stride,
            pool_padding=padding,
        )

    def stock(self, x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:  # type: ignore[override]
        y = F.batch_norm(self.convolved(x, weight, None), None, None, norm_weight, norm_bias, training=True)
        return self.max_pooled(F.relu(y, inplace=True))


def _plain(x: Tensor, weight: Tensor, bias: Tensor, module: Any, function: str) -> Tensor:
    result: Tensor = getattr(module, function)(x, weight, bias)
    return result


def _plain_operation(function: str, stage: Stage) -> Operation:
    """A convolution alone, which is cuDNN's: what the choice costs."""

    transposed = "transpose" in function

    def operands(x: Tensor) -> tuple[Tensor, ...]:
        """Lines are all of an image's, one behind another; volumes have one level."""
        x, weight, bias = (t.detach() for t in stage.operands(x))
        if function.endswith("1d"):
            x, weight = x.flatten(2), weight[:, :, 0]
        elif function.endswith("3d"):
            x, weight = x.unsqueeze(2), weight.unsqueeze(2)
        weight = (weight.transpose(0, 1) if transposed else weight).contiguous()
        return tuple(t.requires_grad_() for t in (x, weight, bias))

    def output_shape(shape: torch.Size) -> Sequence[int]:
        grows = stage.kernel - 1 if transposed else 1 - stage.kernel
        if function.endswith("1d"):
            return shape[0], stage.filters, shape[2] * shape[3] + grows
        size = (shape[2] + grows, shape[3] + grows)
        return (shape[0], stage.filters, *size) if function.endswith("2d") else (shape[0], stage.filters, 1, *size)

    def budget(shape: torch.Size, dtype: torch.dtype) -> tuple[float, float]:
        images, result = shape.numel() * dtype.itemsize, torch.Size(output_shape(shape)).numel() * dtype.itemsize
        return images + result, 2 * (images + result)

    ours, stock = (partial(_plain, module=module, function=function) for module in (autograd, F))
    return Operation(function, "conv", ours, stock, budget, operands=operands, output_shape=output_shape, check=_check)


PLAIN = Stage(6, 14, 16, 5)
ALONE = ("conv2d", "conv1d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
FUSED: dict[str, Stage] = {
    **{f"conv_act_pool2d_{name}": stage for name, stage in STAGES.items()},
    "conv_batch_norm_act2d_resnet50_stem": NormalisedStage(3, 224, 64, 7, 2, 3, (3, 2, 1)),
    # Zhang et al. (2015) of characters, VoxNet (2015) and the 3-D U-Net (2016) of volumes, M5 (2017) of sound.
    "conv_act_pool1d_characters_2": Stage(256, 336, 256, 7, pool=(3, 3, 0), directions=1),
    "conv_batch_norm_act1d_m5_2": NormalisedStage(128, 2000, 128, 3, padding=1, pool=(4, 4, 0), directions=1),
    "conv_act_pool3d_voxnet_2": Stage(32, 14, 32, 3, directions=3),
    "conv_batch_norm_act3d_unet_1": NormalisedStage(32, 32, 64, 3, padding=1, directions=3),
}
COUNTED: dict[str, Stage] = {
    "conv_act_pool2d_early": Stage(3, 24, 32, 3, padding=1),
    "conv_act_pool2d_middle": Stage(64, 12, 32, 3, padding=1),
    "conv_batch_norm_act2d": NormalisedStage(3, 24, 32, 3, padding=1),
    "conv_act_pool1d": Stage(16, 256, 32, 3, padding=1, directions=1),
    "conv_batch_norm_act1d": NormalisedStage(16, 256, 32, 3, padding=1, pool=(4, 4, 0), directions=1),
    "conv_act_pool3d": Stage(4, 8, 32, 3, padding=1, directions=3),
    "conv_batch_norm_act3d": NormalisedStage(4, 8, 32, 3, padding=1, directions=3),
}
OPERATIONS = {
    operation.name: operation
    for operation in (
        *(staged(name, stage) for name, stage in FUSED.items()),
        *(staged(f"{name}_nchw", stage, torch.contiguous_format) for name, stage in FUSED.items()),
        *(staged(f"{name}_no_tf32", stage, tf32=False) for name, stage in FUSED.items()),
        *(_plain_operation(function, PLAIN) for function in ALONE),
    )
}


def batch_of(stage: Stage, batch: int) -> tuple[int, ...]:
    return batch, stage.channels, *[stage.size] * stage.directions


def timed_cases(full: bool) -> list[Case]:
    """The most important first: a time limit cuts the end."""
    stages = {**FUSED, **dict.fromkeys(ALONE, PLAIN)}
    quick = {f"conv_act_pool2d_{name}" for name in QUICK}
    usual = [
        Case(OPERATIONS[name], dtype, size, batch_of(stage, batch))
        for dtype in DTYPES
        for size, batch in SIZES.items()
        for name, stage in stages.items()
        if full or (name in quick and batch == 32 and dtype is torch.bfloat16)
    ]
    others = [
        Case(OPERATIONS[name + suffix], dtype, size, batch_of(stage, batch))
        for suffix, dtypes in (("_nchw", DTYPES), ("_no_tf32", (torch.float32,)))
        for dtype in dtypes
        for size, batch in SIZES.items()
        for name, stage in FUSED.items()
        if not (suffix == "_nchw" and stage.memory_format is torch.contiguous_format)  # which is the usual one
    ]
    return usual + others if full else usual


def counted_cases() -> list[Case]:
    return [Case(staged(name, stage), torch.float32, "counted", batch_of(stage, 1)) for name, stage in COUNTED.items()]


def test_traffic(case: Case, counts: list[dict[str, Any]]) -> None:
    """Fewer bytes than eager, though the single kernel's counts hold all that it rereads from caches."""
    by_direction = {(record["contestant"], record["direction"]): record["bytes"] for record in counts}
    for direction in ("forward", "backward"):
        assert by_direction["fusednn", direction] < by_direction["eager", direction]
