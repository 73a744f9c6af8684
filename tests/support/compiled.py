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

    from fusednn.kernels.base.multi_tensor import FlatOperands

    find = FlatOperands.row

    def row(operands: Sequence[torch.Tensor]):  # type: ignore[no-untyped-def]
        found = find(operands)
        for address, operand in zip(found.tolist(), operands, strict=True):
            address_book[address] = operand.numel() * operand.element_size()
        return found

    FlatOperands.row = staticmethod(row)  # type: ignore[method-assign,assignment]


if ARCHITECTURE:
    import vgpu

    MISSING = vgpu.MISSING
if ARCHITECTURE and not MISSING:
    vgpu.install(ARCHITECTURE)
    # Stock runs on the processor, in full float32: so do kernels, where a test doesn't ask for TF32.
    torch.backends.cudnn.allow_tf32 = False
    _register_tables()
