"""Faults planted in device code, which Triton then compiles anew."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton
from triton.runtime.jit import JITFunction

__all__ = ["forget_compiled", "planted"]


def device_functions() -> Iterator[JITFunction[Any]]:
    """All of ours."""
    return (each for each in triton.runtime.jit._triton_jit_function_registry.values() if "fusednn" in each.module)


def forget_compiled() -> None:
    """Have kernels compiled anew, from the sources that their functions have now."""
    for function in device_functions():
        function.hash = None
        function.device_caches.clear()


@contextmanager
def planted(function: Any, right: str, wrong: str) -> Iterator[None]:
    """With ``wrong`` in place of ``right`` in a device function's source."""
    source = function.src
    assert source.count(right) == 1, source
    function._unsafe_update_src(source.replace(right, wrong))
    forget_compiled()
    try:
        yield
    finally:
        function._unsafe_update_src(source)
        forget_compiled()
