"""What this device gives at best, timed in the same run: a large copy, and a large matrix product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from .timing import DEVICE, DeviceTimer

__all__ = ["measure_ceilings"]

COPY_BYTES = 2 * 2**30  # read plus written
PRODUCT_SIDE = 8192
ROUNDS = 8

Ceilings = dict[str, dict[str, Any]]


def measure_ceilings(timer: DeviceTimer, before: Ceilings | None = None) -> Ceilings:
    """``copy`` and ``matrix_product`` of a result file, with the samples of ``before`` first.

    Each goes to and fro between two pairs of buffers, of random numbers: zeros cost a GPU less power, so less time.
    """
    found: Ceilings = {
        "copy": {"bytes": COPY_BYTES, "samples_us": _sample(timer, _copies)},
        "matrix_product": {
            "operations": 2 * PRODUCT_SIDE**3,
            "dtype": "bf16",
            "shape": [PRODUCT_SIDE] * 3,
            "samples_us": _sample(timer, _products),
        },
    }
    for name, measured in (before or {}).items():
        found[name]["samples_us"] = measured["samples_us"] + found[name]["samples_us"]
    return found


def _sample(timer: DeviceTimer, prepare: Callable[[], Sequence[Callable[[], Any]]]) -> list[float]:
    calls = prepare()
    timer.sample(lambda: calls)  # warm-up
    samples = [sample for _ in range(ROUNDS) for sample in timer.sample(lambda: calls)]
    torch.cuda.empty_cache()
    return samples


def _copies() -> list[Callable[[], Any]]:
    numel = COPY_BYTES // 2 // torch.float32.itemsize
    return [partial(_random(numel).copy_, _random(numel)) for _ in range(2)]


def _products() -> list[Callable[[], Any]]:
    square = (PRODUCT_SIDE, PRODUCT_SIDE)
    return [
        partial(torch.mm, *(_random(*square).bfloat16() for _ in range(2)), out=_random(*square).bfloat16())
        for _ in range(2)
    ]


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE)
