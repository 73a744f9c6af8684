"""A GPU that does nothing: Triton's own driver, launcher and compiled kernels, over a CUDA library whose calls succeed
and do no work.

What a call costs the host can so be measured, and what it launches counted, where there is no GPU.  What a kernel
computes is nothing.  CPU tensors take kernels.  Needs gcc.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

__all__ = ["CountingGenerator", "install", "without_kernels"]

_SOURCES = Path(__file__).resolve().parents[1] / "do_nothing"


def install() -> Callable[[], int]:
    """Make it Triton's device in this process, before fusednn is imported.  Returns the counter of launches."""
    if "fusednn" in sys.modules:
        raise RuntimeError("fusednn is imported already: where its kernels run is settled")
    folder = _build()
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    cuda = ctypes.CDLL(str(folder / "libcuda.so.1"), ctypes.RTLD_GLOBAL)
    cuda.do_nothing_launches.restype = ctypes.c_long

    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    spec = importlib.util.spec_from_file_location("current", folder / "current.so")
    assert spec is not None
    assert spec.loader is not None
    current = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(current)
    for name in ("_cuda_getCurrentRawStream", "_cuda_getDevice"):
        setattr(torch._C, name, getattr(current, name))
    torch.cuda._initialized = True  # type: ignore[attr-defined]

    class Driver(CudaDriver):  # type: ignore[misc]
        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    triton.runtime.driver.set_active(Driver())

    from fusednn.autograd import dispatch
    from fusednn.kernels.base import launch, random

    launch.REMEMBERS = True  # as on a GPU: this driver takes addresses
    dispatch.HOST_BOUND.add("cpu")
    generator = CountingGenerator()
    random.counting_generator = lambda device: generator
    random._drawn = lambda device, seed, offset: torch.zeros(random._BLOCK, 1, dtype=torch.int64).unbind()
    counter: Callable[[], int] = cuda.do_nothing_launches
    return counter


@contextmanager
def without_kernels() -> Iterator[None]:
    """Within, CPU tensors take no kernels, as in any process where nothing stands in for a GPU."""
    from fusednn.autograd.decisions import forget_decisions
    from fusednn.kernels.base import launch

    with mock.patch.object(launch, "ON_CPU", False):
        forget_decisions()
        yield
    forget_decisions()


class CountingGenerator:
    """As much of a GPU's generator as is asked for on the host."""

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.offset = seed, 0

    def initial_seed(self) -> int:
        return self.seed

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        assert offset % 4 == 0, "as PyTorch asks"
        self.offset = offset


def _build() -> Path:
    """The two libraries, compiled once."""
    sources = {name: _SOURCES / name for name in ("driver.c", "current.c")}
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources.values()) + sys.version.encode())
    folder = Path(tempfile.gettempdir()) / f"fusednn-do-nothing-{os.getuid()}-{digest.hexdigest()[:16]}"
    folder.mkdir(mode=0o700, exist_ok=True)
    _compile(sources["driver.c"], folder / "libcuda.so.1", "-Wl,-soname,libcuda.so.1")
    _compile(sources["current.c"], folder / "current.so", f"-I{sysconfig.get_paths()['include']}")
    return folder


def _compile(source: Path, target: Path, *options: str) -> None:
    if target.exists():
        return
    part = target.with_suffix(f".{os.getpid()}")
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-w", *options, source, "-o", part], check=True)
    part.replace(target)
