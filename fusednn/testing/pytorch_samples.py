"""PyTorch's own descriptions of modules and operators: ModuleInfo and OpInfo, with samples and errors.

They live in ``torch.testing._internal``, which wants ``expecttest`` for a base class of its own tests; where that isn't
installed, a stand-in serves.
"""

from __future__ import annotations

import importlib.util
import sys
import types
import unittest
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .samples import Sample

if importlib.util.find_spec("expecttest") is None:
    stand_in = types.ModuleType("expecttest")
    stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
    sys.modules["expecttest"] = stand_in

from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

__all__ = ["MODULE_INFOS", "module_errors", "module_samples", "operator_samples", "samples_of"]

#: ModuleInfo of each ``torch.nn`` class that has one.
MODULE_INFOS: dict[type[nn.Module], Any] = {info.module_cls: info for info in module_db}

# Of the hundreds of samples that losses have, about so many are taken, evenly spread.
_ENOUGH_SAMPLES = 24


def module_samples(cls: type[nn.Module], device: str, dtype: torch.dtype, *, training: bool) -> list[Any]:
    """ModuleInfo's samples of a ``torch.nn`` class that has some."""
    make = MODULE_INFOS[cls].module_inputs_func
    samples = list(make(None, device=device, dtype=dtype, requires_grad=True, training=training))
    return samples[:: len(samples) // _ENOUGH_SAMPLES or 1]


def operator_samples(info: Any, device: str, dtype: torch.dtype) -> list[Any]:
    """OpInfo's samples; off a GPU only some of those that are the product of many arguments.

    The step is prime, so that every value of every argument is met.
    """
    samples = list(info.sample_inputs(device, dtype, requires_grad=dtype.is_floating_point))
    return samples if torch.device(device).type == "cuda" or len(samples) < 500 else samples[::97]


def module_errors(cls: type[nn.Module], device: str) -> list[Any]:
    """ModuleInfo's wrong constructors and calls of a ``torch.nn`` class."""
    info = MODULE_INFOS.get(cls)
    if info is None or info.module_error_inputs_func is None:
        return []
    options = {"device": device, "dtype": torch.float32, "requires_grad": False, "training": True}
    return list(info.module_error_inputs_func(info, **options))


def samples_of(stock: Callable[..., Any], device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Sample]:
    """What PyTorch tests its function, or its class of ``torch.nn``, with: for `fusednn.testing.check_drop_in`.

    Raises LookupError where it has no description of it.
    """
    if isinstance(stock, type) and issubclass(stock, nn.Module):
        if stock not in MODULE_INFOS:
            raise LookupError(f"PyTorch has no ModuleInfo of {stock.__name__}")
        return [
            Sample(
                tuple(one.forward_input.args),
                one.forward_input.kwargs,
                tuple(one.constructor_input.args),
                one.constructor_input.kwargs,
            )
            for one in module_samples(stock, device, dtype, training=True)
        ]
    infos = [info for info in op_db if info.op is stock and dtype in info.dtypes]
    if not infos:
        raise LookupError(f"PyTorch has no OpInfo of {getattr(stock, '__name__', stock)} in {dtype}")
    return [
        Sample((one.input, *one.args), one.kwargs) for info in infos for one in operator_samples(info, device, dtype)
    ]
