"""PyTorch's own descriptions of modules and operators: ModuleInfo and OpInfo, with samples and errors.

They live in ``torch.testing._internal``, which wants ``expecttest`` for a base class of its own tests; where that isn't
installed, a stand-in serves.
"""

import importlib.util
import sys
import types
import unittest
from typing import Any

import torch
from torch import nn

if importlib.util.find_spec("expecttest") is None:
    stand_in = types.ModuleType("expecttest")
    stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
    sys.modules["expecttest"] = stand_in

from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import (
    FunctionInput,
    ModuleInput,
    module_db,
)
from torch.testing._internal.common_optimizers import optim_db

from fusednn import autograd, optim
from fusednn.layers.twin import TWINS

from .device import ON_GPU
from .samples import LAYERS

_INPUTS = {info.module_cls: info.module_inputs_func for info in module_db}
_INFOS = {info.module_cls: info for info in module_db}


# Of the hundreds of samples that losses have, about so many are taken, evenly spread.
_ENOUGH_SAMPLES = 24


def module_samples(cls: type[nn.Module], device: str, dtype: Any, *, training: bool) -> list[ModuleInput]:
    """ModuleInfo's samples of a ``torch.nn`` class; our own, in its style, for those that it leaves out."""
    if cls in _INPUTS:
        samples = list(_INPUTS[cls](None, device=device, dtype=dtype, requires_grad=True, training=training))
        return samples[:: len(samples) // _ENOUGH_SAMPLES or 1]
    sample = _INPUTS[nn.ReLU](None, device=device, dtype=dtype, requires_grad=True, training=training)
    if cls is nn.RReLU:  # equal bounds, so that training, too, has one right answer
        return [ModuleInput(FunctionInput(0.25, 0.25), item.forward_input, item.desc) for item in sample]
    return list(sample)


def operator_samples(info: Any, device: str, dtype: torch.dtype) -> list[Any]:
    """OpInfo's samples; off a GPU only some of those that are the product of many arguments.

    The step is prime, so that every value of every argument is met.
    """
    samples = list(info.sample_inputs(device, dtype, requires_grad=dtype.is_floating_point))
    return samples if ON_GPU or len(samples) < 500 else samples[::97]


def module_errors(cls: type[nn.Module], device: str) -> list[Any]:
    """ModuleInfo's wrong constructors and calls of a ``torch.nn`` class."""
    info = _INFOS.get(cls)
    if info is None or info.module_error_inputs_func is None:
        return []
    options = {"device": device, "dtype": torch.float32, "requires_grad": False, "training": True}
    return list(info.module_error_inputs_func(info, **options))


def inherent_error(name: str, dtype: torch.dtype) -> float:
    """What no implementation to the same specification avoids, on top of the accuracy rule."""
    name = name.lower().removeprefix("nn.functional.")
    if name in ("celu", "hardsigmoid") and dtype is torch.float64:
        return 1e-6  # stock rounds constants to float32 even in float64
    if name.replace("_", "").startswith("linearcrossentropy") and dtype is torch.float32:
        return 4 * torch.finfo(dtype).eps  # products add in another order, chunk by chunk
    if name in ("celu", "elu", "selu") and dtype is torch.float32:
        return 4 * torch.finfo(dtype).eps  # gradients are read off an output of at most 1.76, rounded
    return 0.0


def _by_name(cls: type[nn.Module]) -> str:
    return cls.__name__


#: The activations of ``torch.nn``, and every class that has a twin and samples.
MODULES = sorted(LAYERS, key=_by_name)
SAMPLED = sorted((cls for cls in TWINS if cls in _INPUTS or cls in LAYERS), key=_by_name)

#: PyTorch's descriptions of every function that has a twin.
OPERATORS = [info for info in op_db if info.name.removeprefix("nn.functional.") in autograd.__all__]

#: PyTorch's descriptions of every optimizer that has a twin.
OPTIMIZERS = [info for info in optim_db if info.name in optim.__all__]
