"""Optimizers: subclasses of ``torch.optim``'s whose ``step`` is one multi-tensor kernel launch.

Empty for now: the family's kernels come with a later version.
"""

__all__: list[str] = []
