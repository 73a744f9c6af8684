"""What ``python -m fusednn check`` proved on this machine, and what it couldn't, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .self_test import Result

__all__ = ["conclusion"]

#: By `self_test.where`: what a pass there leaves open.
_OPEN = {
    "in Triton's interpreter": "that compiled kernels compute the same: the interpreter computes with NumPy, and knows "
    "no alignment, no layouts, no shared memory, no approximate functions",
    "compiled, on a virtual GPU": "that a real GPU computes the same: the virtual one executes PTX, one program after "
    "another",
    "on the GPU": "other GPUs than this one, beyond that kernels compile for them",
}


def conclusion(
    outcomes: Sequence[Any], results: Sequence[Result], where: str, family: str | None, variants: bool
) -> str:
    """Of compilations (`check.Outcome`) and tests that ran ``where`` (`self_test.where`), of one family or of all."""
    proved, not_proved = list(_proved(outcomes, results, where)), list(_not_proved(outcomes, results, where))
    if family is not None:
        not_proved.insert(0, f"anything of other families than {family}")
    if outcomes and not variants:
        not_proved.append("that kernels compile well for extents that 16 doesn't divide (--variants)")
    lists = {"Proved here": proved, "Not proved here": not_proved}
    return "\n".join(line for head, listed in lists.items() for line in (f"\n{head}:", *(f"- {one}" for one in listed)))


def _proved(outcomes: Sequence[Any], results: Sequence[Result], where: str) -> Iterator[str]:
    right = [one for one in outcomes if not one.problems]
    if right:
        targets = dict.fromkeys(one.target for one in right)
        read = any(one.target == "sm_90" for one in right)
        code = "; sm_90's machine code spills no registers, and its accesses are as wide as promised" if read else ""
        yield f"{len(right)} of the kernels' configurations compile for {', '.join(targets)}{code}"
    tested = [one for one in results if not one.problems]
    if tested:
        names, dtypes = ({getattr(one, key) for one in tested} for key in ("name", "dtype"))
        yield (
            f"values, gradients, buffers and states of {len(names)} of our layers, functions and optimizers, in "
            f"{len(dtypes)} dtypes, are as near to float64 as PyTorch's, with kernels {where}"
        )
    if not (right or tested):
        yield "nothing"


def _not_proved(outcomes: Sequence[Any], results: Sequence[Result], where: str) -> Iterator[str]:
    for what, checked in (("kernels' configurations", outcomes), ("cases of layers and optimizers", results)):
        if failed := sum(bool(one.problems) for one in checked):
            yield f"{failed} of {len(checked)} {what}, which FAIL: the table says how"
    if not outcomes:
        yield "that kernels compile for other GPUs (it was left out: --no-compile)"
    if not results:
        yield "what kernels compute (it was left out: --no-self-test)"
    else:
        yield _OPEN[where]
        yield "shapes, layouts and options beyond one call of each: the tests of a checkout have those"
    if where != "on the GPU" or not results:
        yield "that calls don't wait for a GPU, and may be captured in graphs: that takes a GPU"
    yield "that anything is faster: python -m fusednn bench one, on a GPU"
    yield "that your model trains as before: python -m fusednn compare"
