"""oneDNN, which computes PyTorch's convolutions on a CPU, kept away from what it computes wrongly."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

__all__ = ["sound_convolution", "without_onednn"]


@contextmanager
def without_onednn() -> Iterator[None]:
    """Within, PyTorch computes on the CPU by itself."""
    # ``torch.backends.mkldnn.flags`` would warn of TF32 each time, and to set ``enabled`` there is an error where flags
    # are frozen (``torch.backends.disable_global_flags``, which torch.testing calls).
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def sound_convolution(weight: Tensor, stride: Sequence[int]) -> AbstractContextManager[None]:
    """Within, the gradients of a convolution with these filters are right.

    Where a stride is longer than the filter, so that it never looks at some pixels, the gradient of the weight that
    oneDNN 3.12 (PyTorch 2.13) computes reads and writes outside its memory: seen for filters of 1 x 1 on images in
    channels-last on processors with AVX2, and for bfloat16 ones of 1 x 2 with AVX-512.  Compiled graphs choose by
    themselves.
    """
    skips_pixels = weight.is_cpu and any(step > size for step, size in zip(stride, weight.shape[2:], strict=True))
    return without_onednn() if skips_pixels and not torch.compiler.is_compiling() else nullcontext()
