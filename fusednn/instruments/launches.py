"""Launches and bytes of calls as a GPU would make them, counted anywhere: kernels are taken, and on a CPU not run.

A launch moves its operands, each once: the budget of the catalogue.  `traffic` counts what programs really load and
store, in Triton's interpreter, and takes a thousand times as long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from ..autograd.dispatch import observe_choices
from ..autograd.operators import forget_plans
from ..kernels.base import launch as launching
from ..kernels.base.launch import Configuration
from ..kernels.base.multi_tensor import FlatOperands
from .traffic import Launch, OperatorCounter, Traffic, touched_bytes

__all__ = ["count_launches"]


@contextmanager
def count_launches() -> Iterator[Traffic]:
    """Count kernel launches, their operands' bytes, and ATen operators, until the ``with`` block ends.

    CPU tensors take kernels inside, which leave their results as memory comes: only use what is thrown away afterwards.
    On a GPU kernels run as ever.
    """
    traffic = Traffic()
    operators = OperatorCounter(traffic)
    listed: dict[tuple[str, int], int] = {}  # bytes of what a kernel finds through a table of addresses
    named = 0
    addresses = FlatOperands.addresses

    def note(configuration: Configuration, programs: int, arguments: tuple[Any, ...]) -> None:
        nonlocal named
        moved = sum(map(touched_bytes, _touched(configuration.names, arguments)))
        key = (configuration.label, programs)
        # Of a table that is remembered from the step before, only what changed is named again.
        listed[key] = max(named, listed.get(key, 0))
        named = 0
        traffic.kernel_launches.append(Launch(configuration.kernel.__name__, programs, moved + listed[key]))
        if arguments[0].is_cuda:
            configuration.launcher(programs, *arguments)

    def addresses_noted(operands: FlatOperands, tensors: Sequence[Tensor], *, written: bool = True) -> Any:
        nonlocal named
        named += sum(touched_bytes(tensor) for tensor in tensors) * (2 if written else 1)
        return addresses(operands, tensors, written=written)

    forget_plans()
    try:
        with (
            mock.patch.object(launching, "ON_CPU", True),
            mock.patch.object(launching, "recorder", note),
            mock.patch.object(FlatOperands, "addresses", addresses_noted),
            observe_choices(lambda choice: None),  # what was decided for stock is decided anew
            operators,
        ):
            yield traffic
    finally:
        forget_plans()


def _touched(names: Sequence[str], arguments: Sequence[Any]) -> Iterator[Tensor]:
    """A launch's operands, but for those in whose place another is passed: ``has_bias`` of 0 says so of the bias."""
    values = dict(zip(names, arguments, strict=True))
    for name, value in values.items():
        if isinstance(value, Tensor) and values.get(f"has_{name.removesuffix('_pointer')}", 1):
            yield value
