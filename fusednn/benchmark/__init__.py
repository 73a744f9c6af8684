"""Microbenchmarks: `one` times an operation beside PyTorch's.

>>> print(fusednn.benchmark.one("gelu", (4096, 4096), against=("eager", "compile")))

Calls are checked before they are timed; contestants take turns; a GPU is held up while calls are enqueued, so that the
host isn't timed; inputs are out of the cache unless told otherwise.  Where another program ran beside them, or the
clock fell, the table says so.
"""

from .cases import Operation
from .one import one, operation_of
from .protocol import Effort
from .sweep import Measurement, Sweep

__all__ = ["Effort", "Measurement", "Operation", "Sweep", "one", "operation_of"]
