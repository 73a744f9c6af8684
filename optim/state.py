"""State beside parameters, as it is kept and restored."""

from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import Tensor

__all__ = ["restore_exactly"]


def restore_exactly(state: MutableMapping[Any, dict[str, Any]], parameter: Tensor, saved: Mapping[str, Any]) -> None:
    """Undo the rounding of float32 state to its 16-bit parameter's type, where it belongs to ours."""
    exact = {"average", "averages", "master"}
    if "master" in saved:
        exact = set(saved) - {"step"}
    for key in exact & set(saved):
        if isinstance(saved[key], Tensor):
            state[parameter][key] = saved[key].to(parameter.device)
