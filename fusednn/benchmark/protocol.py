"""What all measurements share: who takes part, how much is measured, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

__all__ = [
    "COMPILE_MODES",
    "CONTESTANTS",
    "DIRECTIONS",
    "DTYPE_NAMES",
    "CaseRecord",
    "Contest",
    "Direction",
    "Effort",
    "Measured",
    "NamedCase",
    "WrongResultError",
]

Direction = Literal["forward", "backward", "forward_backward"]

#: Forward runs with gradients enabled, so that it saves what training saves.
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward", "forward_backward")

#: Compiled contestants are torch.compile of the stock function, with these modes.
COMPILE_MODES = {"compile": None, "compile-max-autotune": "max-autotune-no-cudagraphs"}

CONTESTANTS = ("fusednn", "eager", *COMPILE_MODES)

#: As result files call them.
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}

CaseRecord = dict[str, Any]


class Measured(Protocol):
    """What can be measured: a `cases.Case`, a `steps.StepCase` or a `networks.NetworkCase`."""

    @property
    def id(self) -> str: ...

    def contestants(self, usual: tuple[str, ...]) -> tuple[str, ...]: ...


class NamedCase:
    """What a case is called: by its operation, dtype and size."""

    operation: Any
    dtype: torch.dtype
    size: str

    @property
    def dtype_name(self) -> str:
        return DTYPE_NAMES[self.dtype]

    @property
    def id(self) -> str:
        return f"{self.operation.name}-{self.dtype_name}-{self.size}"

    def named(self, contestant: str, direction: str, shape: Sequence[int]) -> CaseRecord:
        """What each record begins with."""
        return {
            "family": self.operation.family,
            "operation": self.operation.name,
            "contestant": contestant,
            "direction": direction,
            "dtype": self.dtype_name,
            "size": self.size,
            "shape": list(shape),
        }


class WrongResultError(AssertionError):
    """A contestant's value or gradient is not eager PyTorch's."""


@dataclass(frozen=True)
class Effort:
    """How much is measured: rounds over all input sets, each a sample per set (large) or one in all (small)."""

    warmup_rounds: int = 2
    large_rounds: int = 12
    small_rounds: int = 30
    host_rounds: int = 30


@dataclass
class Contest:
    """The records of one case, and the contestants that couldn't take part, with the reason."""

    records: list[CaseRecord] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def leave_out(self, name: str, error: Exception) -> None:
        """A contestant that can't take part, or is wrong.  Where that is fusednn, the error is raised."""
        if name == "fusednn":
            raise error
        self.left_out[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
