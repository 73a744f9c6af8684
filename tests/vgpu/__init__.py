"""A virtual GPU: runs the PTX that Triton compiles on this machine's processor.  See README.md."""

from .counters import Counters
from .driver import install
from .handlers import MISSING
from .launch import DeviceAssertionError, Options, VirtualGpuError, address_book, counted, machine_options

__all__ = [
    "MISSING",
    "Counters",
    "DeviceAssertionError",
    "Options",
    "VirtualGpuError",
    "address_book",
    "counted",
    "install",
    "machine_options",
]
