"""A Triton driver whose device is this machine's processor: Triton specialises and compiles as ever."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend

from .handlers import CACHE
from .launch import Argument, VirtualGpuError, run
from .program import LoadedKernel

__all__ = ["SHARED_BYTES", "VirtualDriver", "install"]

#: Shared memory that a program may have, by architecture.
SHARED_BYTES = {80: 166912, 90: 232448}


class VirtualDriver(DriverBase):
    """Compiles for a GPU of the architecture ``arch`` (80 for A100, 90 for H100), and runs the PTX."""

    def __init__(self, arch: int = 80) -> None:
        self.arch = arch
        self.utils = self
        self.launcher_cls = _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.arch, 10)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("time on the virtual GPU means nothing")

    # What Triton calls `utils`.

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES[self.arch], "multiprocessor_count": 108, "warpSize": 32}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
        """Module, function, registers, spills, most threads; ``kernel`` is the PTX."""
        loaded = _load(kernel)
        return loaded, loaded, 32, 0, 1024

    def unload_module(self, module: Any) -> None:
        pass


@functools.cache
def _load(ptx: bytes) -> LoadedKernel:
    return LoadedKernel(ptx.decode())


class _Launcher:
    """Called by Triton for each launch of one kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._signature = source.signature
        self._metadata = metadata

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        loaded: LoadedKernel,
        packed: Any,
        launch: Any,
        enter: Callable[[Any], None] | None,
        leave: Callable[[Any], None] | None,
        *values: Any,
    ) -> None:
        grid = x, y, z
        if not x * y * z:
            return
        if x >= 2**31 or y >= 2**16 or z >= 2**16:
            raise VirtualGpuError(f"a grid of {grid} is larger than CUDA allows")
        if enter is not None:
            enter(launch)
        arguments = list(_flat(self._signature.items(), values))
        arguments += self._scratch(x * y * z)[: len(loaded.program.parameters) - len(arguments)]
        run(loaded, grid, self._metadata.shared, arguments)
        if leave is not None:
            leave(launch)

    def _scratch(self, programs: int) -> list[Argument]:
        """Memory that Triton asks for, for kernels that keep something there."""
        sizes = self._metadata.global_scratch_size, self._metadata.profile_scratch_size
        memory = [torch.from_numpy(np.empty(size * programs, np.uint8)) if size else None for size in sizes]
        return [Argument("scratch", "*u8", each) for each in memory]


def _flat(signature: Iterable[tuple[str, Any]], values: Iterable[Any]) -> Iterator[Argument]:
    """Run-time arguments; tuples one by one."""
    for (name, type_), value in zip(signature, values, strict=True):
        if isinstance(type_, tuple):
            yield from _flat([(f"{name}[{n}]", each) for n, each in enumerate(type_)], value)
        elif type_ != "constexpr":
            yield Argument(name, type_, value)


def _keep_ptx(backend: Any, ptx: str, metadata: Any, options: Any, capability: int) -> bytes:
    """In place of the assembler."""
    return ptx.encode()


def install(arch: int = 80) -> None:
    """Make the virtual GPU Triton's device in this process.  Compiled kernels get a folder of their own: in place of
    machine code they hold PTX."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("the virtual GPU runs compiled kernels: unset TRITON_INTERPRET")
    triton.knobs.cache.dir = str(CACHE / "triton")
    CUDABackend.make_cubin = _keep_ptx
    triton.runtime.driver.set_active(VirtualDriver(arch))
