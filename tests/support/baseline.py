"""The committed figures of the benchmarks (``bench/baseline.json``), which tests hold new ones against."""

# ruff: noqa: E402
import sys
from functools import cache
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))  # the benchmarks are no package: they are not installed

import baseline

RENEW = "renew it with: python -m fusednn bench baseline"


@cache
def committed() -> dict[str, Any]:
    return baseline.load()


def applies(*packages: str) -> bool:
    """Whether the figures were made with these packages' installed versions: others have other figures."""
    return all(baseline.versions()[package] == committed()["versions"][package] for package in packages)


def complaint(part: str, name: str, *figures: int) -> str | None:
    """What is worse than committed, in words."""
    worse = baseline.worse(part, figures, committed()[part].get(name))
    return worse and f"{name}: {worse}; {RENEW}"
