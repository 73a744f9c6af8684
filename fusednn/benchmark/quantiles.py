"""Order statistics of timings: medians, because one slow sample says nothing about the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Spread", "median", "quantile", "quiet", "spread"]


class Spread(NamedTuple):
    """The median of samples, and the interval that holds the middle 80 % of them."""

    p10: float
    median: float
    p90: float


def quantile(samples: Sequence[float], q: float) -> float:
    """The ``q``-quantile (0 to 1), linear between neighbours.  Raises ValueError without samples."""
    if not samples:
        raise ValueError("no samples: nothing has quantiles")
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def median(samples: Sequence[float]) -> float:
    """What half of the samples are below."""
    return quantile(samples, 0.5)


def quiet(samples: Sequence[float]) -> float:
    """The 5th percentile: CPU time on a machine where other programs run, as if they didn't."""
    return quantile(samples, 0.05)


def spread(samples: Sequence[float]) -> Spread:
    """The middle of samples."""
    return Spread(quantile(samples, 0.1), quantile(samples, 0.5), quantile(samples, 0.9))
