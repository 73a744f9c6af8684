"""The launches of a call: what their kernels were given, and the same again elsewhere in memory."""

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from fusednn import kernels
from fusednn.kernels.base import launch as launching
from fusednn.kernels.base.launch import Configuration

__all__ = ["Launch", "assert_shipped", "launches", "note_launches", "specialised_integers"]

#: A configuration, and what it was launched with.
Noted = tuple[Configuration, tuple[object, ...]]


def specialised_integers(configuration: Configuration) -> list[str]:
    """Those that Triton compiles a kernel anew for where they are 1, or multiples of 16."""
    signature = dict(configuration.signature)
    return [
        each.name
        for each in configuration.kernel.params
        if signature.get(each.name, "*")[0] in "iu" and not each.do_not_specialize
    ]


class Launch(NamedTuple):
    configuration: Configuration
    programs: int
    arguments: tuple[Any, ...]

    @property
    def values(self) -> dict[str, Any]:
        return dict(zip(self.configuration.names, self.arguments, strict=True))

    @property
    def alignment(self) -> int:
        """What the kernel is told of its extents; 1 where it takes no such promise."""
        return int(self.configuration.keywords_for(self.arguments).get("ALIGN", 1))

    def again(self, *, unaligned: Container[str] = ()) -> dict[str, Tensor]:
        """Launch on copies of the tensors, and return them as the kernel leaves them."""
        values = {
            name: _copy(value, aligned=name not in unaligned) if isinstance(value, Tensor) else value
            for name, value in self.values.items()
        }
        self.configuration.launcher(self.programs, *values.values())
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _copy(tensor: Tensor, *, aligned: bool) -> Tensor:
    """The same elements, with what lies between them, at a multiple of 16 bytes or one element behind it."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    extent = last + 1 if tensor.numel() else 0
    memory = torch.empty(extent + 1, dtype=tensor.dtype)[0 if aligned else 1 :][:extent]
    assert (memory.data_ptr() % 16 == 0) == aligned or not extent
    memory.copy_(tensor.as_strided((extent,), (1,)))
    return memory.as_strided(tensor.shape, tensor.stride())


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """Those of the ``with`` block, which run as ever."""
    found: list[Launch] = []

    def run(configuration: Configuration, programs: int, arguments: tuple[Any, ...]) -> None:
        found.append(Launch(configuration, programs, arguments))
        configuration.launcher(programs, *arguments)

    with mock.patch.object(launching, "recorder", run):
        yield found


def note_launches(patch: pytest.MonkeyPatch, *modules: object) -> list[Noted]:
    """What these modules of kernels launch from now on."""
    launched: list[Noted] = []
    launch = launching.launch

    def record(configuration: Configuration, programs: int, *arguments: object) -> None:
        launched.append((configuration, arguments))
        launch(configuration, programs, *arguments)

    for module in modules:
        patch.setattr(module, "launch", record)
    return launched


def assert_shipped(launched: Iterable[Noted], family: str | None = None) -> None:
    """What was launched is what the compile check compiles, of the dtypes that it was given."""
    shipped = set(kernels.shipped(family))
    for configuration, arguments in launched:
        assert configuration in shipped
        for (name, kind), argument in zip(configuration.signature, arguments, strict=True):
            expected = launching.TRITON_TYPE[argument.dtype] if isinstance(argument, Tensor) else None
            assert expected is None or kind == f"*{expected}", f"{configuration.label}: {name} is {expected}"
