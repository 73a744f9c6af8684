"""Other processes in which CPU tensors take kernels, whatever they do in this one."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

__all__ = ["has_virtual_gpu", "interpreting_processes", "kernel_command"]


def kernel_command(*arguments: str) -> tuple[list[str], dict[str, str]]:
    """``python -m fusednn ARGUMENTS`` with kernels for CPU tensors: the command, and its environment variables."""
    if has_virtual_gpu():
        paths = [str(_TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "FUSEDNN_VGPU": "80"}
        return [sys.executable, "-m", "support.run_compiled", "fusednn", *arguments], variables
    # NumPy warns of infinities, which are results here.
    quietly = ["-W", "ignore::RuntimeWarning:triton.runtime.interpreter"]
    return [sys.executable, *quietly, "-m", "fusednn", *arguments], os.environ | {"TRITON_INTERPRET": "1"}


def has_virtual_gpu() -> bool:
    """Whether kernels can run compiled here: a checkout's tests have a virtual GPU, which needs gcc."""
    return (_TESTS / "vgpu").is_dir() and shutil.which("gcc") is not None


_TESTS = Path(__file__).parents[2] / "tests"


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
