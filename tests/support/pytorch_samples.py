"""PyTorch's own descriptions of modules and operators: ModuleInfo and OpInfo, with samples and errors.

They live in ``torch.testing._internal``, which wants ``expecttest`` for a base class of its own tests; where that isn't
installed, a stand-in serves.
"""

import importlib.util
import sys
import types
import unittest
from typing import Any

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

from fusednn import optim

from .samples import CASES, LAYERS

_INPUTS = {info.module_cls: info.module_inputs_func for info in module_db}


def module_samples(cls: type[nn.Module], device: str, dtype: Any, *, training: bool) -> list[ModuleInput]:
    """ModuleInfo's samples of a ``torch.nn`` class; our own, in its style, for the two that it leaves out."""
    if cls in _INPUTS:
        return list(_INPUTS[cls](None, device=device, dtype=dtype, requires_grad=True, training=training))
    sample = _INPUTS[nn.ReLU](None, device=device, dtype=dtype, requires_grad=True, training=training)
    if cls is nn.RReLU:  # equal bounds, so that training, too, has one right answer
        return [ModuleInput(FunctionInput(0.25, 0.25), item.forward_input, item.desc) for item in sample]
    return list(sample)


MODULES = sorted(LAYERS, key=lambda cls: cls.__name__)
_NAMES = {case.name for case in CASES}
OPERATORS = [info for info in op_db if info.name.removeprefix("nn.functional.") in _NAMES]
#: Descriptions of the optimizers that have twins.
OPTIMIZERS = [info for info in optim_db if info.name in optim.__all__]
