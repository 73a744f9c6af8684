"""The suite's third mode: kernels compiled for the architecture in ``FUSEDNN_VGPU`` (80 or 90), on the virtual GPU.

Processes that tests start find the variable, too.
"""

import os
from collections.abc import Sequence

import torch

#: The architecture that kernels are compiled for in this mode, or 0.
ARCHITECTURE = int(os.environ.get("FUSEDNN_VGPU", "0"))
#: Why there is no virtual GPU here, or "".
MISSING = ""


def _register_tables() -> None:
    """Kernels of optimizers find their tensors through addresses: tell the virtual GPU what is behind those."""
    from vgpu import address_book

    from fusednn.kernels.base import multi_tensor
    from fusednn.optim import known

    find = multi_tensor.addresses

    def addresses(tensors: Sequence[torch.Tensor]) -> list[int]:
        found = find(tensors)
        for address, tensor in zip(found, tensors, strict=True):
            address_book[address] = tensor.numel() * tensor.element_size()
        return found

    for module in (multi_tensor, known):
        module.addresses = addresses  # type: ignore[attr-defined]


if ARCHITECTURE:
    import vgpu

    MISSING = vgpu.MISSING
if ARCHITECTURE and not MISSING:
    vgpu.install(ARCHITECTURE)
    # Stock runs on the processor, in full float32: so do kernels, where a test doesn't ask for TF32.
    torch.backends.cudnn.allow_tf32 = False
    _register_tables()
