"""Counters of the steps that parameters have taken: advanced where they are, without waiting for a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .recipe import Recipe

__all__ = ["Counters", "advance", "one_step", "relative"]


class Counters(NamedTuple):
    """A number for each parameter: how many steps it has taken, this one included, and NAdam's product.

    Numbers that only the device knows are float64 tensors.
    """

    step: Sequence[float] | NDArray[np.float64] | Tensor
    mu_product: Sequence[float] | Tensor | None = None


class Shelf:
    """The step counters of many parameters side by side in one tensor, on the host: one addition advances all.

    Each stays the tensor that it was, a number of its own.
    """

    def __init__(self, counters: Sequence[Tensor]) -> None:
        self._counters = counters
        self._row = torch.stack(list(counters))
        for i, counter in enumerate(counters):
            counter.set_(self._row.untyped_storage(), i, (), ())
        self._places = list(map(Tensor.data_ptr, counters))

    @staticmethod
    def of(own: Sequence[dict[str, Any]]) -> Shelf | None:
        """None where something else than a step is counted, or not on the host, or not alike."""
        if "step" not in own[0] or "mu_product" in own[0]:
            return None
        counters = [state["step"] for state in own]
        plain = all(type(counter) is Tensor and counter.device.type == "cpu" for counter in counters)
        return Shelf(counters) if plain and len({counter.dtype for counter in counters}) == 1 else None

    def is_in_place(self) -> bool:
        return list(map(Tensor.data_ptr, self._counters)) == self._places

    def advance(self) -> NDArray[np.float64]:
        self._row.add_(1.0)
        return self._row.numpy().astype(np.float64)


def one_step(found_inf: Tensor | None, like: Tensor) -> Any:
    """What a counter advances by: nothing after an overflow."""
    return 1.0 if found_inf is None else (found_inf.reshape(()) == 0).to(like.dtype)


def advance(
    own: Sequence[dict[str, Any]],
    device: torch.device,
    recipe: Recipe,
    found_inf: Tensor | None,
    shelf: Shelf | None = None,
) -> Counters:
    """Advance the counters in the state, and give them to the kernel: where they are, without a synchronisation.

    ``shelf`` has those of ``own``, where they stand side by side.
    """
    if shelf is not None and found_inf is None:
        return Counters(shelf.advance())
    keys = [key for key in ("step", "mu_product") if key in own[0]]
    on_host = found_inf is None and all(state[key].device.type == "cpu" for state in own for key in keys)
    if not on_host:
        for state in own:
            for key in keys:
                state[key] = state[key].to(device, non_blocking=True)
    steps = [state["step"] for state in own]
    products = [state[key] for state in own for key in keys[1:]]
    if on_host:
        one = torch.tensor(1.0, dtype=steps[0].dtype, device="cpu")
        torch._foreach_add_(steps, one, alpha=1.0)  # as stock does: 1 is wrapped once
        counts = [step.item() for step in steps]
        if products:
            beta1, decay = float(recipe.a), float(recipe.c)
            mus = {count: beta1 * (1.0 - 0.5 * 0.96 ** (count * decay)) for count in set(counts)}
            torch._foreach_mul_(products, [mus[count] for count in counts])
        return Counters(counts, [product.item() for product in products] or None)
    torch._foreach_add_(steps, one_step(found_inf, steps[0]))
    step = torch.stack(steps).double()
    if not products:
        return Counters(step)
    mu = recipe.a * (1 - 0.5 * torch.pow(0.96, step * recipe.c))
    if found_inf is not None:
        mu = torch.where(found_inf == 0, mu, 1.0)
    torch._foreach_mul_(products, list(mu.to(products[0].dtype).unbind()))
    return Counters(step, torch.stack(products).double())


def relative(counters: Counters, tensors: int) -> tuple[tuple[float, float], list[Any], Tensor | None]:
    """Counters as numbers for the launch, what each tensor's differ by from them, and those on the device."""
    step, product = counters
    zeros = np.zeros(tensors)
    if isinstance(step, Tensor):
        on_device = torch.stack([step, product if isinstance(product, Tensor) else torch.ones_like(step)])
        return (0.0, 0.0), [zeros.view(np.int64)] * 2, on_device
    steps, products = np.array(step, dtype=np.float64), zeros if product is None else np.array(product)
    differences = [(steps - steps[0]).view(np.int64), (products - products[0]).view(np.int64)]
    return (float(steps[0]), float(products[0])), differences, None
