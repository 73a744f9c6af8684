"""Schedules of dropout's probability, in the style of ``torch.optim.lr_scheduler``."""

from __future__ import annotations

from typing import Any

from torch import nn

from .bias_activation_dropout import BiasActivationDropout
from .drop_connect import DropConnect

__all__ = ["AnnealedDropout"]

_DROPPING = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    BiasActivationDropout,
    DropConnect,
)


class AnnealedDropout:
    """Lowers the dropout probability of every layer of a model linearly, from its own to ``final_p``, epoch by epoch.

    p_t = p_0 s + final_p (1 - s) with s = max(0, 1 - t / total_epochs)

    >>> schedule = AnnealedDropout(model, total_epochs=50)
    >>> for epoch in range(100):
    ...     train(model)
    ...     schedule.step()

    Takes stock's dropout layers and fusednn's.  The probability is an argument of the kernels: no kernel is compiled
    when it changes.  ``torch.compile`` ties what it traces to the probability, of stock's layers too: it traces the
    model anew in each epoch that changes one, as often as ``torch._dynamo.config.recompile_limit`` allows.

    Args:
        model: the module whose layers are scheduled: those it has now.
        total_epochs: epochs until ``final_p`` is reached, at least 1.
        final_p: the probability from then on.
        last_epoch: index of the last epoch.  -1 starts anew; otherwise the model's probabilities are taken to be the
            initial ones, and are set to those of that epoch.

    Raises ValueError for a ``total_epochs`` below 1 and a ``final_p`` outside [0, 1].  Source: Rennie, Goel, Thomas,
    "Annealed Dropout Training of Deep Networks" (SLT 2014), with final_p = 0.
    """

    def __init__(self, model: nn.Module, total_epochs: int, final_p: float = 0.0, last_epoch: int = -1) -> None:
        if total_epochs < 1:
            raise ValueError(f"total_epochs has to be at least 1, but got {total_epochs}")
        if not 0 <= final_p <= 1:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {final_p}")
        self.total_epochs = total_epochs
        self.final_p = final_p
        self.last_epoch = max(last_epoch, 0)
        self._layers: dict[str, Any] = {
            name: module for name, module in model.named_modules() if isinstance(module, _DROPPING)
        }
        self.base_ps = {name: float(layer.p) for name, layer in self._layers.items()}
        self._assign()

    def get_p(self) -> dict[str, float]:
        """Each layer's probability in the current epoch, by its name in the model."""
        left = max(0.0, 1 - self.last_epoch / self.total_epochs)
        return {name: p * left + self.final_p * (1 - left) for name, p in self.base_ps.items()}

    def get_last_p(self) -> dict[str, float]:
        """What the layers were last set to."""
        return {name: layer.p for name, layer in self._layers.items()}

    def step(self) -> None:
        """Go on to the next epoch."""
        self.last_epoch += 1
        self._assign()

    def state_dict(self) -> dict[str, Any]:
        """The schedule as a dict, without the layers."""
        return {
            "total_epochs": self.total_epochs,
            "final_p": self.final_p,
            "last_epoch": self.last_epoch,
            "base_ps": dict(self.base_ps),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a schedule, and set the layers' probabilities to its epoch's.

        Raises KeyError where the schedule names other layers than this model has.
        """
        if state_dict["base_ps"].keys() != self._layers.keys():
            raise KeyError(f"the schedule is of the layers {', '.join(state_dict['base_ps'])}")
        self.total_epochs = state_dict["total_epochs"]
        self.final_p = state_dict["final_p"]
        self.last_epoch = state_dict["last_epoch"]
        self.base_ps = dict(state_dict["base_ps"])
        self._assign()

    def _assign(self) -> None:
        for name, p in self.get_p().items():
            self._layers[name].p = p
