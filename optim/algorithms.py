"""The optimizers.  A class says how its parameter groups become numbers for the kernels; the rest is inherited."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import optim

from . import lion
from .optimizer import FusedOptimizer
from .options import OPTIONS
from .recipe import Recipe

__all__ = ["SGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "Lion", "NAdam", "RAdam", "RMSprop"]


class SGD(FusedOptimizer, optim.SGD):
    """b = momentum b + (1 - dampening) g;  w = w - lr b, or w - lr (g + momentum b) with ``nesterov``.

    b is g in the first step.  Twin of `torch.optim.SGD`, with the keywords of `FusedOptimizer`.  Source: Sutskever,
    Martens, Dahl, Hinton, "On the importance of initialization and momentum in deep learning" (ICML 2013).
    """

    def _recipe(self, group: dict[str, Any]) -> Recipe:
        algorithm = "sgd"
        if group["momentum"] != 0:
            algorithm = "sgd_nesterov" if group["nesterov"] else "sgd_momentum"
        return Recipe(algorithm, a=group["momentum"], b=group["dampening"], weight_decay=group["weight_decay"])


class Adagrad(FusedOptimizer, optim.Adagrad):
    """s = s + g^2;  w = w - lr / (1 + (t - 1) lr_decay) g / (sqrt(s) + eps).

    Twin of `torch.optim.Adagrad`, with the keywords of `FusedOptimizer`.  Source: Duchi, Hazan, Singer, "Adaptive
    Subgradient Methods for Online Learning and Stochastic Optimization" (JMLR 2011).
    """

    def _recipe(self, group: dict[str, Any]) -> Recipe:
        return Recipe("adagrad", a=group["lr_decay"], eps=group["eps"], weight_decay=group["weight_decay"])


class Adadelta(FusedOptimizer, optim.Adadelta):
    """v = rho v + (1 - rho) g^2;  d = sqrt(u + eps) / sqrt(v + eps) g;  u = rho u + (1 - rho) d^2;  w = w - lr d.

    Twin of `torch.optim.Adadelta`, with the keywords of `FusedOptimizer`.  Source: Zeiler, "ADADELTA: An Adaptive
    Learning Rate Method" (2012).
    """

    def _recipe(self, group: dict[str, Any]) -> Recipe:
        return Recipe("adadelta", a=group["rho"], eps=group["eps"], weight_decay=group["weight_decay"])


class RMSprop(FusedOptimizer, optim.RMSprop):
    """v = alpha v + (1 - alpha) g^2;  d = g / (sqrt(v) + eps), with the variance for v if ``centered``;
    b = momentum b + d;  w = w - lr b.

    Twin of `torch.optim.RMSprop`, with the keywords of `FusedOptimizer` and one more.  Sources: Tieleman and Hinton,
    lecture 6.5 of "Neural Networks for Machine Learning" (2012); Graves, "Generating Sequences With Recurrent Neural
    Networks" (2013).

    Args:
        nesterov: look ahead, w = w - lr (d + momentum b).  Wants a momentum; ValueError without.
    """

    options: ClassVar[Mapping[str, Any]] = {**OPTIONS, "nesterov": False}

    @classmethod
    def _check_group(cls, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        if group.get("nesterov") and not group.get("momentum", 0) > 0:
            raise ValueError("Nesterov momentum requires a momentum")

    @contextmanager
    def _around_stock(self, group: dict[str, Any]) -> Iterator[None]:
        if not group.get("nesterov"):
            yield
            return
        # d + momentum b = b + momentum (b - b'), with b' the buffer before: the second term is missing from stock.
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        before = {
            p: self.state[p]["momentum_buffer"].clone()
            for p in parameters
            if "momentum_buffer" in self.state.get(p, {})
        }
        yield
        with torch.no_grad():
            for p in parameters:
                change = self.state[p]["momentum_buffer"] - before.get(p, 0.0)
                p.sub_(group["lr"] * group["momentum"] * change)

    def _recipe(self, group: dict[str, Any]) -> Recipe:
        algorithm = "rmsprop_centered" if group["centered"] else "rmsprop"
        if group["momentum"] > 0:
            algorithm += "_nesterov" if group.get("nesterov") else "_momentum"
        return Recipe(
            algorithm,
            a=group["alpha"],
            b=group["momentum"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )


class Adam(FusedOptimizer, optim.Adam):
    """m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;
    w = w - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps), with the largest v so far if ``amsgrad``.

    Twin of `torch.optim.Adam`, with the keywords of `FusedOptimizer`.  Sources: Kingma and Ba, "Adam: A Method for
    Stochastic Optimization" (ICLR 2015); Reddi, Kale, Kumar, "On the Convergence of Adam and Beyond" (ICLR 2018).
    """

    def _recipe(self, group: dict[str, Any]) -> Recipe:
        return _adam_recipe("adam_amsgrad" if group["amsgrad"] else "adam", group)


class AdamW(FusedOptimizer, optim.AdamW):
    """Adam, with weights decayed beside the update: w = w (1 - lr weight_decay).

    Twin of `torch.optim.AdamW`, with the keywords of `FusedOptimizer`.  Source: Loshchilov and Hutter, "Decoupled
    Weight Decay Regularization" (ICLR 2019).
    """

    def _recipe(self, group: dict[str, Any]) -> Recipe:
        return _adam_recipe("adam_amsgrad" if group["amsgrad"] else "adam", group)


class Adamax(FusedOptimizer, optim.Adamax):
    """m = beta1 m + (1 - beta1) g;  u = max(beta2 u, |g| + eps);  w = w - lr / (1 - beta1^t) m / u.

    Twin of `torch.optim.Adamax`, with the keywords of `FusedOptimizer`.  Source: Kingma and Ba, "Adam: A Method for
    Stochastic Optimization" (ICLR 2015), section 7.1.
    """

    def _recipe(self, group: dict[str, Any]) -> Recipe:
        return _adam_recipe("adamax", group)


class NAdam(FusedOptimizer, optim.NAdam):
    """Adam with Nesterov momentum, whose coefficient mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2) grows.

    Twin of `torch.optim.NAdam`, with the keywords of `FusedOptimizer`.  Source: Dozat, "Incorporating Nesterov Momentum
    into Adam" (2016).
    """

    def _recipe(self, group: dict[str, Any]) -> Recipe:
        return _adam_recipe("nadam", group)


class RAdam(FusedOptimizer, optim.RAdam):
    """Adam whose adaptive step is scaled by how much its variance is known, and left out in the first steps.

    Twin of `torch.optim.RAdam`, with the keywords of `FusedOptimizer`.  Source: Liu et al., "On the Variance of the
    Adaptive Learning Rate and Beyond" (ICLR 2020).
    """

    def _recipe(self, group: dict[str, Any]) -> Recipe:
        return _adam_recipe("radam", group)


class Lion(FusedOptimizer, lion.Lion):
    """w = w (1 - lr weight_decay);  w = w - lr sign(beta1 m + (1 - beta1) g);  m = beta2 m + (1 - beta2) g.

    Keeps one average where Adam keeps two.  ``torch.optim`` has none: the constructor is in its style (``params``,
    ``lr``, ``betas``, ``weight_decay``, ``maximize``), with the keywords of `FusedOptimizer`.  Source: Chen et al.,
    "Symbolic Discovery of Optimization Algorithms" (NeurIPS 2023).
    """

    def _recipe(self, group: dict[str, Any]) -> Recipe:
        beta1, beta2 = group["betas"]
        return Recipe("lion", a=beta1, b=beta2, decoupled_weight_decay=group["weight_decay"])


def _adam_recipe(algorithm: str, group: dict[str, Any]) -> Recipe:
    beta1, beta2 = group["betas"]
    decoupled = group.get("decoupled_weight_decay", False)
    return Recipe(
        algorithm,
        a=beta1,
        b=beta2,
        c=group.get("momentum_decay", 0.0),
        eps=group["eps"],
        weight_decay=0.0 if decoupled else group["weight_decay"],
        decoupled_weight_decay=group["weight_decay"] if decoupled else 0.0,
    )
