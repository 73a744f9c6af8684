"""Lion, which ``torch.optim`` doesn't have, as it might have it: the stock side of `fusednn.optim.Lion`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

__all__ = ["Lion"]


class Lion(Optimizer):
    """w = w (1 - lr weight_decay);  w = w - lr sign(beta1 m + (1 - beta1) g);  m = beta2 m + (1 - beta2) g.

    In PyTorch's operators, in the style of ``torch.optim``: the optimizer that `fusednn.optim.Lion` is the twin of.

    Args:
        params: parameters, or dicts of parameter groups.
        lr: learning rate; a third to a tenth of AdamW's.
        betas: decays of the average in the update's direction and in the average that is kept.
        weight_decay: decoupled, as AdamW's; three to ten times AdamW's.
        maximize: whether to go uphill.

    Raises ValueError where a hyperparameter is out of its range.  Source: Chen et al., "Symbolic Discovery of
    Optimization Algorithms" (NeurIPS 2023).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    def _init_group(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor]
    ) -> None:
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError("Lion does not support sparse gradients")
            state = self.state[p]
            if not state:
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            params.append(p)
            grads.append(p.grad)
            exp_avgs.append(state["exp_avg"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters; ``closure``, if given, first evaluates the loss anew, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            exp_avgs: list[Tensor] = []
            self._init_group(group, params, grads, exp_avgs)
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p, g, exp_avg in zip(params, grads, exp_avgs, strict=True):
                g = -g if group["maximize"] else g
                p.mul_(1 - lr * group["weight_decay"])
                p.sub_(lr * (exp_avg * beta1 + g * (1 - beta1)).sign())
                exp_avg.mul_(beta2).add_(g * (1 - beta2))
        return loss
