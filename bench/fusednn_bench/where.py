"""Whether a GPU is here; where none is, kernels run in Triton's interpreter.

To be imported before anything that imports Triton, which decides for its interpreter then.
"""

from __future__ import annotations

import os

import torch

__all__ = ["TIMED"]

#: On a GPU things are timed, elsewhere they are counted.
TIMED = torch.cuda.is_available()

if not TIMED:
    os.environ["TRITON_INTERPRET"] = "1"
