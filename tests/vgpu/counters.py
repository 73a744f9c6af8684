"""What a launch did, counted."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .translate import CLASSES

__all__ = ["Counters", "GlobalTraffic", "SharedTraffic"]

_FIRST_MEMORY_COUNTER = 24  # in memory.h
assert len(CLASSES) <= _FIRST_MEMORY_COUNTER


class GlobalTraffic(NamedTuple):
    """Accesses of a warp, sectors of 32 bytes that they touch, and bytes of those that some lane uses."""

    requests: int
    sectors: int
    bytes_used: int


class SharedTraffic(NamedTuple):
    """Accesses of a warp, waves that the banks take for them, and waves that they'd take without conflicts."""

    requests: int
    waves: int
    least_waves: int


class Counters(NamedTuple):
    """One launch; ``words`` as the machine counts."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    words: NDArray[np.uint64]

    WORDS = 40

    @property
    def instructions(self) -> dict[str, int]:
        """Instructions that warps ran, by class."""
        return {name: int(count) for name, count in zip(CLASSES, self.words, strict=False) if count}

    @property
    def loads(self) -> GlobalTraffic:
        return GlobalTraffic(*self._memory(0))

    @property
    def stores(self) -> GlobalTraffic:
        return GlobalTraffic(*self._memory(3))

    @property
    def shared(self) -> SharedTraffic:
        return SharedTraffic(*self._memory(6))

    def _memory(self, start: int) -> list[int]:
        start += _FIRST_MEMORY_COUNTER
        return [int(word) for word in self.words[start : start + 3]]
