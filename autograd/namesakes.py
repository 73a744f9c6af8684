"""Namesakes of functions of PyTorch that differ in little but their names."""

from collections.abc import Callable
from functools import partial
from typing import Concatenate, ParamSpec, TypeVar

from .dispatch import or_stock

__all__ = ["namesake"]

_First = TypeVar("_First")
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def namesake(
    function: Callable[Concatenate[_First, _Arguments], _Result], first: _First, name: str, doc: str
) -> Callable[_Arguments, _Result]:
    """``function`` with this first argument, as a function of its own in the same module; or as `or_stock` chooses."""
    given: Callable[_Arguments, _Result] = partial(function, first)
    made = or_stock(given)  # its signature is that of ``given``
    made.__module__, made.__name__, made.__qualname__, made.__doc__ = function.__module__, name, name, doc
    return made
