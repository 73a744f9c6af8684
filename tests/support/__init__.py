"""What the tests share: accuracy, layouts, samples and standing checks.

Imported before fusednn, which looks for the kernels' device when it is imported itself.
"""

from . import compiled

__all__ = ["compiled"]
