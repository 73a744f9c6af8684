"""A kernel repository, as Hugging Face's ``kernels`` loads it, of fusednn's layers."""

from . import layers

__all__ = ["layers"]
