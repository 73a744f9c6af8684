"""Whether a GPU is here; where none is, kernels run in Triton's interpreter."""

from __future__ import annotations

import os

import torch

__all__ = ["TIMED", "prepare"]

#: On a GPU things are timed, elsewhere they are counted.
TIMED = torch.cuda.is_available()


def prepare() -> None:
    """To be called before anything imports Triton, which decides for its interpreter then."""
    if not TIMED:
        os.environ["TRITON_INTERPRET"] = "1"
