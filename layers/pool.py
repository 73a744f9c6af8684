"""Max pooling layers: drop-in subclasses of ``torch.nn``'s.

Each takes float16, bfloat16, float32 or float64, contiguous or channels-last, with all arguments of its namesake, and
saves at most a byte for each window; whatever else PyTorch accepts goes to the stock operator, which raises the stock
errors.
"""

from typing import Any

from torch import Tensor, nn

from ..autograd.pool import max_pool1d, max_pool2d, max_pool3d
from .twin import Twin

__all__ = ["MaxPool1d", "MaxPool2d", "MaxPool3d"]


def _sizes(layer: Any) -> tuple[Any, Any, Any, Any]:
    return layer.kernel_size, layer.stride, layer.padding, layer.dilation


class MaxPool1d(Twin, nn.MaxPool1d):
    """y[n, c, i] = max over k of x[n, c, stride i + dilation k - padding], input (N, C, L) or (C, L).

    Twin of `torch.nn.MaxPool1d`; with ``return_indices`` it returns (y, indices).  Source: PyTorch's page of
    ``torch.nn.MaxPool1d``.
    """

    def forward(self, input: Tensor) -> Any:
        return max_pool1d(input, *_sizes(self), ceil_mode=self.ceil_mode, return_indices=self.return_indices)


class MaxPool2d(Twin, nn.MaxPool2d):
    """y[n, c, i, j] = max over (k, l) of x[n, c, stride i + dilation k - padding, stride j + dilation l - padding].

    Twin of `torch.nn.MaxPool2d`: input (N, C, H, W) or (C, H, W), sizes for both directions or for each; with
    ``return_indices`` it returns (y, indices).  Source: PyTorch's page of ``torch.nn.MaxPool2d``.
    """

    def forward(self, input: Tensor) -> Any:
        return max_pool2d(input, *_sizes(self), ceil_mode=self.ceil_mode, return_indices=self.return_indices)


class MaxPool3d(Twin, nn.MaxPool3d):
    """The maximum over windows of volumes: `MaxPool2d` with a depth.

    Twin of `torch.nn.MaxPool3d`: input (N, C, D, H, W) or (C, D, H, W), sizes for all directions or for each; with
    ``return_indices`` it returns (y, indices).  Source: PyTorch's page of ``torch.nn.MaxPool3d``.
    """

    def forward(self, input: Tensor) -> Any:
        return max_pool3d(input, *_sizes(self), ceil_mode=self.ceil_mode, return_indices=self.return_indices)
