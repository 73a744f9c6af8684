"""Whether a GPU kept its clock while it was timed, by ``nvidia-smi``."""

from __future__ import annotations

import subprocess
from typing import NamedTuple

import torch

__all__ = ["Clocks", "complaint", "parse", "read_clocks"]

_QUERY = "clocks.sm,temperature.gpu,clocks_throttle_reasons.active"
#: Of NVML's reasons why clocks are low; not those of idle devices and of clocks that the owner set.
_REASONS = {
    0x4: "its power cap",
    0x8: "a slowdown by hardware",
    0x20: "heat",
    0x40: "heat",
    0x80: "a power brake",
}
_SHARE = 0.95


class Clocks(NamedTuple):
    """Megahertz of the multiprocessors, degrees Celsius, and NVML's bits that say what holds the clock down."""

    megahertz: int
    celsius: int
    reasons: int


def read_clocks() -> Clocks | None:
    """Of the current device; None where there is no ``nvidia-smi``, or it can't tell."""
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    device = f"GPU-{uuid}" if uuid is not None else "0"
    command = ("nvidia-smi", "-i", device, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse(done.stdout) if done.returncode == 0 else None


def parse(line: str) -> Clocks | None:
    """What ``nvidia-smi`` prints: ``1980, 41, 0x0000000000000004``."""
    try:
        megahertz, celsius, reasons = (int(word, 0) for word in line.split(","))
    except ValueError:  # "[N/A]"
        return None
    return Clocks(megahertz, celsius, reasons)


def complaint(before: Clocks | None, after: Clocks | None) -> str:
    """What is wrong, in words, or nothing."""
    if before is None or after is None:
        return "nobody watched the clock: there is no nvidia-smi, or it can't tell"
    held = sorted({words for bit, words in _REASONS.items() if after.reasons & bit})
    told = [f"held down by {' and '.join(held)}"] if held else []
    if after.megahertz < _SHARE * before.megahertz:
        told.insert(0, f"fell from {before.megahertz} to {after.megahertz} MHz")
    return f"the clock was {', '.join(told)} ({after.celsius} degrees Celsius)" if told else ""
