"""Memory layouts that inputs and incoming gradients may have: every one is legal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["ARRANGEMENTS", "LAYOUTS"]

#: Each takes a contiguous 4-d tensor and returns the same values in another layout (or repeated values, expanded).
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "sliced": lambda x: torch.cat([x, x], dim=3)[..., : x.shape[3]],
    "strided": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
    "offset": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    "expanded": lambda x: x[:, :1].expand(x.shape),
    "scalar": lambda x: x.flatten()[0].expand(x.shape),
}

#: Those that tensors of any rank above 1 may have.
ARRANGEMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "channels_last, sliced": lambda x: torch.cat([x, x], 1).movedim(1, -1).contiguous().movedim(-1, 1)[:, : x.shape[1]],
    "transposed": lambda x: x.transpose(-2, -1).contiguous().transpose(-2, -1),
    "sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "expanded": lambda x: x[:, :1].expand(x.shape),
}
