"""The peak of networks' training steps, with and without making results again, by the allocator of their device.

The networks of `fusednn_bench.memory`, on batches that fill a GPU.  As there each parameter's gradient is let go as it
comes; what libraries allocate for themselves by way of PyTorch is in it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .memory import MemoryCase, checkpointed, let_go, prepared
from .peak import Allocated, Peak

__all__ = ["enlarged", "measure_peaks"]

_PHOTOGRAPHS, _TOKENS, _ROWS = (32, 3, 224, 224), (32, 512, 256), (16384, 256)


def enlarged(case: MemoryCase) -> MemoryCase:
    """The network on a batch that fills a GPU."""
    shape = {2: _ROWS, 3: _TOKENS, 4: _PHOTOGRAPHS}[len(case.shape)]
    return replace(case, shape=(1024, *case.shape[1:]) if case.name == "LeNet" else shape, size="large")


def measure_peaks(case: MemoryCase, device: torch.device) -> list[dict[str, Any]]:
    """A record of each contestant.  On a CPU, in rehearsal, tensors are counted, and kernels aren't run."""
    import fusednn

    stock, x = prepared(case)

    def replaced(recompute: bool) -> nn.Module:
        model = copy.deepcopy(stock)
        fusednn.replace_layers(model, fuse=True, recompute=recompute)
        return model

    makers: dict[str, Callable[[], nn.Module]] = {
        "eager": lambda: copy.deepcopy(stock),
        "checkpoint": lambda: checkpointed(copy.deepcopy(stock)),
        "fusednn": lambda: replaced(False),
        "fusednn-recompute": lambda: replaced(True),
    }
    return [{**case.record(name), **_measured(make().to(device), x.to(device))} for name, make in makers.items()]


def _measured(model: nn.Module, x: Tensor) -> dict[str, int]:
    """What is held after the forward pass, and at most in the step: the second one, since the first compiles."""
    from fusednn.instruments.launches import count_launches

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(let_go)
    with nullcontext() if x.is_cuda else count_launches():
        model(x).float().square().mean().backward()
        with _memory(model, x) as memory:
            y = model(x)
            kept = memory.held - y.nbytes
            y.float().square().mean().backward()
            return {"kept_bytes": kept, "peak_bytes": memory.bytes}


def _memory(model: nn.Module, x: Tensor) -> AbstractContextManager[Any]:
    return Allocated(x.device) if x.is_cuda else Peak((x, *model.parameters(), *model.buffers()))
