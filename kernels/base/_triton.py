"""Triton, or inert stand-ins for it where it is not installed.

Kernel modules write ``from ._triton import libdevice, tl, triton``.  Without Triton (macOS, Windows) they still
import, as plain undecorated functions that nothing calls: the dispatcher sees ``AVAILABLE`` and takes PyTorch's own
operators.
"""

from typing import TYPE_CHECKING, Any

__all__ = ["AVAILABLE", "INTERPRETED", "INTERPRETING", "ON_CPU", "WHERE", "libdevice", "tl", "triton"]


class _Absent:
    """Stands in for a missing module: every attribute is another stand-in, and decorating changes nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent()

    def __call__(self, function: Any = None, /, **_: Any) -> Any:
        return self if function is None else function


if TYPE_CHECKING:
    # Device code is typed loosely on purpose: Triton's own annotations describe the host's view of it.
    triton: Any
    tl: Any
    libdevice: Any
    AVAILABLE: bool
else:
    try:
        import triton
        import triton.language as tl
        from triton.language.extra import libdevice

        AVAILABLE = True
    except ImportError:
        triton = tl = libdevice = _Absent()
        AVAILABLE = False

#: True where kernels run in Triton's interpreter, on CPU tensors (``TRITON_INTERPRET=1``).  Triton reads the variable
#: when a kernel is decorated, so this is settled by the time the package is imported.
INTERPRETING: bool = AVAILABLE and bool(triton.knobs.runtime.interpret)

#: The same, for branches inside device code.
INTERPRETED = tl.constexpr(INTERPRETING)


def _has_cpu_driver() -> bool:
    """Whether Triton was given a driver whose device is the CPU.  Asking for the default one could start CUDA."""
    driver = getattr(triton.runtime.driver, "_active", None)
    return driver is not None and driver.get_active_torch_device().type == "cpu"


#: True where kernels take CPU tensors: in the interpreter, or compiled for a driver whose device is the CPU.
ON_CPU: bool = AVAILABLE and (INTERPRETING or _has_cpu_driver())

#: Where kernels run, in words.
WHERE = "in Triton's interpreter" if INTERPRETING else "on the CPU" if ON_CPU else "on the GPU"
