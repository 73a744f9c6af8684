"""Namesakes of functions of PyTorch that differ in little but their names."""

from collections.abc import Callable
from functools import partial
from typing import Concatenate, ParamSpec, TypeVar

from .dispatch import or_stock

__all__ = ["named", "namesake"]

_First = TypeVar("_First")
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def named(function: Callable[_Arguments, _Result], module: str, name: str, doc: str) -> Callable[_Arguments, _Result]:
    """``function`` as if it had been defined by this name at the top of this module."""
    function.__module__, function.__name__, function.__qualname__, function.__doc__ = module, name, name, doc
    return function


def namesake(
    function: Callable[Concatenate[_First, _Arguments], _Result], first: _First, name: str, doc: str
) -> Callable[_Arguments, _Result]:
    """``function`` with this first argument, as a function of its own in the same module, and as of `or_stock`."""
    given: Callable[_Arguments, _Result] = partial(function, first)
    return named(or_stock(given), function.__module__, name, doc)  # the signature is that of ``given``
