"""Our functions in the place of ``torch.nn.functional``'s: set by hand, as people patch models."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.pytorch_samples import OPERATORS
from torch import Tensor

from fusednn import autograd

#: The functions that have a namesake in ``torch.nn.functional``.
NAMES = [name for name in autograd.__all__ if hasattr(F, name)]
_INFOS = {info.name.removeprefix("nn.functional."): info for info in reversed(OPERATORS)}


def arguments_of(name: str, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call that leaves one right result."""
    if "dropout" in name:
        dims = {"dropout1d": 1, "dropout3d": 3}.get(name, 2)
        return (torch.randn((2, 3, *[4] * dims), device=device), 0.0, True), {}
    if name == "rrelu":
        return (torch.randn(5, device=device), 0.25, 0.25, True), {}
    sample = next(iter(_INFOS[name].sample_inputs(torch.device(device), torch.float32)))
    return (sample.input, *sample.args), sample.kwargs


class Tagged(Tensor):
    """A tensor subclass, which kernels don't take."""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [Tensor, Tagged], ids=["plain", "subclass"])
def test_functions_patched_by_name(name: str, kind: type[Tensor], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each function in its namesake's place: what no kernel takes reaches PyTorch's, not ours again."""
    (first, *others), options = arguments_of(name, device)
    first = first.as_subclass(kind)
    expected = getattr(F, name)(first, *others, **options)
    for other in NAMES:
        monkeypatch.setattr(F, other, getattr(autograd, other))
    result = getattr(F, name)(first, *others, **options)
    assert type(result) is type(expected)
    torch.testing.assert_close(result, expected)
