"""Twins of other libraries' layers, a file for each library.  None is imported: classes are known by their names."""

from . import timm, torchvision, transformers

__all__ = ["timm", "torchvision", "transformers"]
