"""Proof on the caller's own model and machine: `compare`."""

from .compare import compare
from .report import Comparison

__all__ = ["Comparison", "compare"]
