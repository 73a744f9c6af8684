"""What only a GPU can show: calls that wait for it, compilations in mid-course, and graphs of launches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from fusednn import kernels

Result = TypeVar("Result")


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Any call that waits for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def compiled_kernels(*families: str) -> int:
    """How many kernels of these families, or of all, Triton has compiled for this process."""
    distinct = {configuration.kernel for family in families or (None,) for configuration in kernels.shipped(family)}
    return sum(len(cache[0]) for kernel in distinct for cache in kernel.device_caches.values())


@contextmanager
def no_recompilation(*families: str) -> Iterator[None]:
    """No kernel of these families, or of any, is compiled in the ``with`` block."""
    before = compiled_kernels(*families)
    yield
    assert compiled_kernels(*families) == before


def check_capture(step: Callable[[], tuple[Tensor, ...]]) -> None:
    """A step doesn't wait for the GPU, and a graph of it gives its bits."""
    expected = step()
    with no_synchronisation():
        step()
    graph, captured = capture(step)
    graph.replay()
    for ours, eager in zip(captured, expected, strict=True):
        assert torch.equal(ours, eager)


def capture(run: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of what `run` launches, and its result, which every replay writes anew.

    Before, it runs three times on a stream of its own, as PyTorch asks.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result
