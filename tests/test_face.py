"""The face that users program against: names, arguments and defaults of what PyTorch has no namesake of, and reprs.

Renewed by ``PYTHONPATH=tests python tests/test_face.py > tests/face.txt``, in the commit that changes it on purpose.
"""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_refusals import OWN_LAYERS
from torch import nn

import fusednn
from fusednn import autograd, layers, optim

pytestmark = pytest.mark.stock

WRITTEN = Path(__file__).with_name("face.txt")


def signature(function: Callable[..., Any]) -> str:
    """Without annotations, which are written otherwise from one Python to the next."""
    found = inspect.signature(function)
    parameters = [
        one.replace(annotation=one.empty, default=one.default.__name__ if callable(one.default) else one.default)
        if one.default is not one.empty
        else one.replace(annotation=one.empty)
        for one in found.parameters.values()
    ]
    return str(found.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def face() -> Iterator[str]:
    stock = {fusednn: (), autograd: (F,), layers: (nn,), optim: (torch.optim,)}
    for module, namesakes in stock.items():
        for name in sorted(module.__all__):
            thing = getattr(module, name)
            if callable(thing) and not any(hasattr(namesake, name) for namesake in namesakes):
                yield f"{module.__name__}.{name}{signature(thing)}"
    for name, (make, _) in OWN_LAYERS.items():
        yield f"{name}: {make()!r}"


def parts(entry: str) -> tuple[str, set[str]]:
    """A name and its arguments."""
    name, _, arguments = entry.partition("(")
    return name, set(arguments.removesuffix(")").split(", "))


def test_the_face_is_the_one_that_is_written_down() -> None:
    """What is written is still there, and its defaults are the same; there may be more."""
    now = dict(map(parts, face()))
    for name, arguments in map(parts, WRITTEN.read_text(encoding="utf-8").split("\n\n")):
        assert arguments <= now.get(name, set()), f"{name}: {arguments - now.get(name, set())}; {__doc__}"


if __name__ == "__main__":
    print("\n\n".join(face()), end="")
