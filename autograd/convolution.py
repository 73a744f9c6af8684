"""The arguments of a convolution, in one, two or three directions, transposed or not."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.conv import conv_size
from . import stock as F
from .onednn import sound_convolution
from .pool import sizes_of

__all__ = ["Convolution", "convolution_of", "padding_of", "stock_convolution"]


class Convolution(NamedTuple):
    """The arguments of a convolution besides its operands; each tuple is (along the height, along the width), the depth
    first if any.  A transposed one has an ``output_padding``.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    output_padding: tuple[int, ...] | None = None

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """cuDNN's."""
        return torch.convolution(x, weight, None, *self._arguments)

    def gradients(
        self, dz: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool], *, bias: Sequence[int] | None = None
    ) -> tuple[Tensor | None, ...]:
        """Of images, filters, and a bias of this shape, as far as they are needed."""
        with sound_convolution(weight, self.stride):
            gradients: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward.default(
                dz, x, weight, bias, *self._arguments, needed
            )
        return gradients

    @property
    def _arguments(self) -> tuple[Any, ...]:
        transposed = self.output_padding is not None
        output_padding = self.output_padding or (0,) * len(self.stride)
        return self.stride, self.padding, self.dilation, transposed, output_padding, self.groups

    def size(self, size: Sequence[int], filters: Sequence[int]) -> tuple[int, ...]:
        """The size of the result, of images and filters of these sizes; of what has one direction, one is enough."""
        size, filters = ((1, *given) if len(given) == 1 else tuple(given) for given in (size, filters))
        if self.output_padding is None:
            return conv_size(size, filters, self.stride, self.padding, self.dilation)
        return tuple(
            (extent - 1) * step - 2 * border + spread * (taps - 1) + extra + 1
            for extent, taps, step, border, spread, extra in zip(
                size, filters, self.stride, self.padding, self.dilation, self.output_padding, strict=True
            )
        )


#: By the number of directions.
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def stock_convolution(
    directions: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    output_padding: Any = None,
) -> Tensor:
    """PyTorch's, transposed where there is an ``output_padding``."""
    if output_padding is None:
        return _CONVOLUTIONS[directions](input, weight, bias, stride, padding, dilation, groups)
    return _TRANSPOSED[directions](input, weight, bias, stride, padding, output_padding, groups, dilation)


def padding_of(directions: int, weight: Any, stride: Any, padding: Any, dilation: Any) -> tuple[tuple[int, ...], Any]:
    """A padding in words as numbers: what `pad` adds first, where the two ends differ, and the padding that is left."""
    even = (0, 0) * directions
    if padding == "valid":
        return even, 0
    if padding != "same" or not isinstance(weight, Tensor) or weight.dim() != directions + 2:
        return even, padding
    spread = sizes_of(dilation, directions)
    if sizes_of(stride, directions) != (1,) * directions or spread is None:
        return even, None
    added = [step * (size - 1) for step, size in zip(spread, weight.shape[2:], strict=True)]
    odd = tuple(one for total in reversed(added) for one in (0, total % 2))
    return odd, tuple(total // 2 for total in added)


def convolution_of(
    directions: int, stride: Any, padding: Any, dilation: Any, groups: Any, output_padding: Any = None
) -> Convolution | None:
    """The arguments, or None where one isn't what PyTorch takes."""
    given = (stride, padding, dilation) if output_padding is None else (stride, padding, dilation, output_padding)
    found = [sizes_of(argument, directions) for argument in given]
    if any(sizes is None for sizes in found) or type(groups) is not int:
        return None
    sizes = [sizes for sizes in found if sizes is not None]
    if directions == 1:
        sizes = [(one, *along) for one, along in zip((1, 0, 1, 0), sizes, strict=False)]
    step, border, spread, *extra = sizes
    return Convolution(step, border, spread, groups, *extra)
