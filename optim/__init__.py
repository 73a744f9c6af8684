"""Optimizers: subclasses of ``torch.optim``'s, and Lion, whose ``step`` is one multi-tensor kernel launch.

`replace` turns an optimizer that exists already into its twin; `explain` tells which path a step takes, and why.
"""

from .algorithms import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, Lion, NAdam, RAdam, RMSprop
from .optimizer import FusedOptimizer, GroupPath, explain
from .replace import replace

__all__ = [
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "FusedOptimizer",
    "GroupPath",
    "Lion",
    "NAdam",
    "RAdam",
    "RMSprop",
    "explain",
    "replace",
]
