"""PyTorch's descriptions of what has a twin, and what its samples need beside."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# isort: split  (the samples above bring what these need)
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import FunctionInput, ModuleInput
from torch.testing._internal.common_optimizers import optim_db

from fusednn import autograd, optim
from fusednn.layers.twin import TWINS
from fusednn.testing import pytorch_samples
from fusednn.testing.pytorch_samples import MODULE_INFOS

from .samples import LAYERS


def module_samples(cls: type[nn.Module], device: str, dtype: Any, *, training: bool) -> list[ModuleInput]:
    """ModuleInfo's samples of a ``torch.nn`` class; our own, in its style, for those that it leaves out."""
    if cls in MODULE_INFOS:
        return pytorch_samples.module_samples(cls, device, dtype, training=training)
    sample = pytorch_samples.module_samples(nn.ReLU, device, dtype, training=training)
    if cls is nn.RReLU:  # equal bounds, so that training, too, has one right answer
        return [ModuleInput(FunctionInput(0.25, 0.25), item.forward_input, item.desc) for item in sample]
    return sample


def module_pairs(
    cls: type[nn.Module], device: str, dtype: torch.dtype, *, training: bool
) -> Iterator[tuple[nn.Module, nn.Module, ModuleInput]]:
    """Stock and ours for every sample, built alike."""
    for sample in module_samples(cls, device, dtype, training=training):
        arguments, options = sample.constructor_input.args, sample.constructor_input.kwargs
        modules = []
        for one in (cls, TWINS[cls]):
            torch.manual_seed(1)
            modules.append(one(*arguments, **options).to(device, dtype).train(training))
        yield modules[0], modules[1], sample


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
SAMPLED = sorted((cls for cls in TWINS if cls in MODULE_INFOS or cls in LAYERS), key=_by_name)

#: PyTorch's descriptions of every function that has a twin.
OPERATORS = [info for info in op_db if info.name.removeprefix("nn.functional.") in autograd.__all__]

#: PyTorch's descriptions of every optimizer that has a twin.
OPTIMIZERS = [info for info in optim_db if info.name in optim.__all__]
