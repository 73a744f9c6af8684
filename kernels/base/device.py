"""What kernels ask of a GPU: whether they run on it at all, and what chooses between their configurations.

Each device is asked once, before its first launch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._triton import INTERPRETING, ON_CPU, triton

__all__ = ["Device", "LaunchError", "device_at", "device_of", "device_refusal", "on_refusal", "refuse"]

#: The least compute capability of NVIDIA's GPUs that Triton supports.  For older ones it compiles without a complaint,
#: and without tensor cores.
_LEAST_CAPABILITY = (8, 0)
#: AMD's GPUs that it makes matrix instructions for: MI200, MI300, MI350, and Radeons from the RX 7900 on.
_AMD = {"gfx90a", "gfx942", "gfx950"} | {f"gfx{number}" for number in (1100, 1101, 1102, 1150, 1151, 1200, 1201)}
#: Shared memory that a program may need on any GPU.
_LEAST_SHARED_BYTES = 64 * 1024


class LaunchError(RuntimeError):
    """A kernel couldn't be launched, and nothing of it ran.  From then on its device takes PyTorch's operators."""


class Device(NamedTuple):
    """A GPU: its architecture (``"sm_90"``, ``"gfx942"``), the threads of a warp, and the bytes of shared memory that a
    program may have.
    """

    architecture: str
    warp_size: int
    shared_bytes: int

    @property
    def is_amd(self) -> bool:
        return self.architecture.startswith("gfx")

    @property
    def has_tf32(self) -> bool:
        """Whether Triton multiplies in TF32: of AMD's, for the MI300 alone."""
        return not self.is_amd or self.architecture == "gfx942"

    @property
    def takes_large_tiles(self) -> bool:
        """Whether products have registers for the sums of large tiles: tensor cores of the H100 and the B200 read
        operands from shared memory, AMD's Instincts have 512 registers a thread; elsewhere operands take some of 255.
        """
        return self.architecture.startswith(("sm_90", "sm_10", "gfx9"))

    @property
    def refusal(self) -> str | None:
        """Why no kernel runs on it, or None."""
        if self.is_amd:
            if self.architecture not in _AMD:
                return f"no kernels for {self.architecture}"
        elif (capability := divmod(int(self.architecture.removeprefix("sm_")), 10)) < _LEAST_CAPABILITY:
            wanted = ".".join(map(str, _LEAST_CAPABILITY))
            return f"compute capability {capability[0]}.{capability[1]}: kernels need {wanted}"
        if self.shared_bytes < _LEAST_SHARED_BYTES:
            return f"{self.shared_bytes} bytes of shared memory: kernels need {_LEAST_SHARED_BYTES}"
        return None


#: What CPU tensors count as: an H100.
_INTERPRETED = Device("sm_90", 32, 227 * 1024)

#: What is called when a device is refused later than at its first launch: whoever remembers that it takes kernels.
on_refusal: list[Callable[[], None]] = []

#: Devices on which a launch failed, and why; CPUs are -1.
_failed: dict[int, str] = {}


@torch.compiler.assume_constant_result
def device_refusal(index: int) -> str | None:
    """Why no kernel runs on a device, or None: by its architecture, by what Triton needs, or since a launch failed."""
    return _failed.get(index) or (_refusal(index) if index >= 0 else None)


def device_of(tensor: Tensor) -> Device:
    """The device that a tensor's kernels run on."""
    return device_at(tensor.get_device())


def refuse(index: int, kernel: str, error: BaseException) -> LaunchError:
    """Let stock serve a device from now on, and say so, once: a kernel couldn't be launched there."""
    where = "the CPU" if index < 0 else f"GPU {index}"
    cause = (str(error).strip() or type(error).__name__).splitlines()[0]
    message = f"fusednn: {kernel} can't be launched on {where}: {cause}"
    warnings.warn(f"{message}; PyTorch's operators take over there", RuntimeWarning, stacklevel=2)
    for forget in on_refusal:
        forget()
    _failed[index] = f"since {kernel} couldn't be launched: {cause}"
    return LaunchError(message)


@cache
def _refusal(index: int) -> str | None:
    try:
        return device_at(index).refusal
    except Exception as error:  # of Triton's: no C compiler, no driver for this GPU
        return f"Triton can't be used: {str(error).strip().splitlines()[0]}"


@cache
def device_at(index: int) -> Device:
    """The device of an index; CPUs are -1."""
    if index < 0:
        compiled = ON_CPU and not INTERPRETING
        return _of_target(triton.runtime.driver.active.get_current_target()) if compiled else _INTERPRETED
    properties = torch.cuda.get_device_properties(index)
    # Asked of Triton, whose figure it is; which also shows whether Triton finds all that it needs on this host.
    shared = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    if torch.version.hip:
        return Device(properties.gcnArchName.partition(":")[0], properties.warp_size, shared)
    return Device(f"sm_{properties.major}{properties.minor}", properties.warp_size, shared)


def _of_target(target: Any) -> Device:
    """What Triton was told to compile for, with the interpreter's memory."""
    name = str(target.arch)
    return _INTERPRETED._replace(
        architecture=name if name.startswith("gfx") else f"sm_{name}", warp_size=target.warp_size
    )
