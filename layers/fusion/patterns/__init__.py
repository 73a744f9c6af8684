"""What can be computed in one, a file each: what it matches, what it refuses, how it is computed apart and together.

They are tried in this order, as of ``docs/adding-a-pattern.md``.
"""

from . import (
    act_pool,
    block_end,
    conv,
    conv_dropout,
    formula,
    gate,
    highway,
    linear,
    maxout,
    norm,
    norm_dropout,
    places,
)
from .pattern import Pattern

__all__ = ["PATTERNS"]

PATTERNS: tuple[Pattern, ...] = (
    *(
        places.PATTERN,
        norm_dropout.PATTERN,
        conv_dropout.PATTERN,
        conv.PATTERN,
        norm.PATTERN,
        linear.PATTERN,
        maxout.POOLING,
        maxout.VIEW,
    ),
    *(formula.PATTERN, highway.PATTERN, gate.PATTERN, act_pool.PATTERN, block_end.PATTERN),
)
