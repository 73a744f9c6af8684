"""The one place where strides are normalised, so that kernels see flat, dense memory.

An elementwise kernel doesn't care in which order the dimensions lie in memory, as long as each element has its own
address and there are no holes: contiguous, channels-last and transposed tensors are all walked as they are.  Sliced and
expanded tensors are copied once, into the memory order that PyTorch's own operators would give their result
(``torch.preserve_format``).
"""

from collections.abc import Sequence

from torch import Tensor

__all__ = ["dense", "dense_like", "is_dense", "placed"]


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without holes and without overlap, in any order of the dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def dense(tensor: Tensor) -> Tensor:
    """``tensor`` itself where it is dense, otherwise a dense copy in the memory order of a PyTorch result."""
    return tensor if is_dense(tensor) else tensor.clone()


def dense_like(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    """``tensor`` in the memory order that these dense strides describe: itself, or a copy."""
    for size, ours, theirs in zip(tensor.shape, tensor.stride(), strides, strict=True):
        if ours != theirs and size != 1:
            return tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)
    return tensor


def placed(x: Tensor) -> Tensor:
    """``x`` where samples lie one after another, and each channel is a run of its sample's memory, or a column; else a
    copy.
    """
    x = dense(x)
    samples, channels = x.shape[:2]
    places = x.numel() // (samples * channels)
    alike = samples == 1 or x.stride(0) == places * channels
    return x if alike and (channels == 1 or x.stride(1) in (1, places)) else x.contiguous()
