"""What proves our kernels, for those of your own: the accuracy rule, standing checks, instruments, samples, faults.

>>> from fusednn.testing import Sample, check_drop_in
>>> print(check_drop_in(my_gelu, torch.nn.functional.gelu, [torch.randn(4, 5, 6, 7)]))

Checks raise AssertionError, and say what is wrong.  Kernels are those that run on the samples' device: on a GPU, or on
CPU tensors in Triton's interpreter, with ``TRITON_INTERPRET=1`` in the environment.

`pytorch_samples` has PyTorch's own samples, `broken` broken kernels to test checks with.  They are imported by name:
the one takes seconds, the other is for those who write checks.
"""

from ..instruments.saved_tensors import saved_tensors
from ..instruments.traffic import measure_traffic
from .accuracy import assert_accurate, assert_same_bits, one_rounding
from .bounds import OutOfBoundsError, checked_bounds
from .drop_in import DropIn, assert_same_signature, check_drop_in
from .layouts import ARRANGEMENTS, LAYOUTS
from .samples import EXTREMES, FAR, Sample, random_tensor
from .standing import check_against_stock, leaf, poisoned_memory, value_and_gradients

__all__ = [
    "ARRANGEMENTS",
    "EXTREMES",
    "FAR",
    "LAYOUTS",
    "DropIn",
    "OutOfBoundsError",
    "Sample",
    "assert_accurate",
    "assert_same_bits",
    "assert_same_signature",
    "check_against_stock",
    "check_drop_in",
    "checked_bounds",
    "leaf",
    "measure_traffic",
    "one_rounding",
    "poisoned_memory",
    "random_tensor",
    "saved_tensors",
    "value_and_gradients",
]
