"""fusednn: fused Triton kernels that replace PyTorch layers, losses and optimizers, drop-in.

>>> import fusednn
>>> report = fusednn.replace_layers(model)          # in place; parameters, hooks, state_dict keys stay
>>> print(fusednn.explain(model, batch))            # per layer: kernel or stock path, and why

CUDA tensors take Triton kernels; CPU tensors take PyTorch's own operators, or, with ``TRITON_INTERPRET=1`` in the
environment, the kernels in Triton's interpreter.
"""

from . import autograd, benchmark, kernels, layers, optim, testing
from ._version import __version__
from .autograd.dispatch import always_kernels, compile_policy, record_kernels
from .autograd.recompute import recompute
from .comparison import Comparison, compare
from .instruments.census import Census, census
from .layers import (
    explain,
    register_activation,
    register_twin,
    replace_functions,
    replace_layers,
    restore_functions,
    restore_layers,
)

__all__ = [
    "Census",
    "Comparison",
    "__version__",
    "always_kernels",
    "autograd",
    "benchmark",
    "census",
    "compare",
    "compile_policy",
    "explain",
    "kernels",
    "layers",
    "optim",
    "recompute",
    "record_kernels",
    "register_activation",
    "register_twin",
    "replace_functions",
    "replace_layers",
    "restore_functions",
    "restore_layers",
    "testing",
]
