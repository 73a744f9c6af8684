"""Running something where kernels are interpreted, whatever this process does with them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

__all__ = ["interpreting_processes"]


@contextmanager
def interpreting_processes(count: int = 1) -> Iterator[ProcessPoolExecutor]:
    """New processes in which CPU tensors take kernels, in Triton's interpreter.

    Triton reads TRITON_INTERPRET when kernels are decorated, that is when fusednn is imported: it takes a new process.
    """
    with (
        _environment_variable("TRITON_INTERPRET", "1"),
        ProcessPoolExecutor(max_workers=count, mp_context=get_context("spawn")) as processes,
    ):
        yield processes


@contextmanager
def _environment_variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for the processes that are started inside the ``with`` block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
