"""Which of PyTorch's operators a model still calls although there are kernels for them, and why.

Operators are seen as they are dispatched, so it doesn't matter whether a layer, a function or a method called them.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..autograd.dispatch import Choice, observe_choices
from ..layers.fusion.members import observe_modules
from ..layers.twin import Layer

__all__ = ["LeftOperator", "operators_left"]

#: PyTorch's operators that kernels of ours take the place of, without the underscore of those in place.  Of dropout, it
#: is the random numbers that are seen on a CPU, and of what drops samples on any device.
_SERVED = frozenset(
    (
        *("elu", "gelu", "glu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log_sigmoid_forward", "mish"),
        *("_prelu_kernel", "relu", "rrelu_with_noise", "sigmoid", "silu", "softplus", "tanh", "threshold"),
        *("_batch_norm_with_update", "_native_batch_norm_legit", "cudnn_batch_norm", "native_batch_norm"),
        *("_log_softmax", "_softmax", "bernoulli", "max_pool2d_with_indices", "native_dropout"),
        *("binary_cross_entropy", "binary_cross_entropy_with_logits", "huber_loss", "mse_loss", "smooth_l1_loss"),
        *("nll_loss2d_forward", "nll_loss_forward"),
    )
)


class LeftOperator(NamedTuple):
    """An operator that PyTorch computed, how often in a module (by its name in the model), and why."""

    module: str
    cls: str
    operator: str
    calls: int
    reason: str


class _Watch(TorchDispatchMode):
    """Sees each operator of PyTorch, and none of those inside of ours."""

    takes_kernels = True

    def __init__(self) -> None:
        super().__init__()
        self.running: list[nn.Module] = []
        self.reasons: dict[nn.Module, str] = {}
        self.seen: Counter[tuple[nn.Module, str, str]] = Counter()
        self.attends = False  # whether what is seen is of `scaled_dot_product_attention`, which drops by itself

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = function.name().partition("::")
        name = name.partition(".")[0].removesuffix("_")
        self.attends = name == "_safe_softmax" or (self.attends and name in ("bernoulli", "detach", "empty_like"))
        if namespace == "aten" and name in _SERVED and self.running and not self.attends:
            module = self.running[-1]
            reason = self.reasons.get(module)
            if reason is None:
                reason = "its code calls PyTorch's function" if not isinstance(module, Layer) else "computed apart"
            self.seen[module, name, reason] += 1
        return function(*args, **(kwargs or {}))

    def enter(self, module: nn.Module, _: Any) -> None:
        self.running.append(module)
        self.reasons.pop(module, None)

    def leave(self, *_: Any) -> None:
        self.running.pop()

    def choose(self, choice: Choice) -> None:
        if self.running and not choice.kernel:
            self.reasons[self.running[-1]] = choice.reason


def operators_left(model: nn.Module, *inputs: Any, **kwargs: Any) -> list[LeftOperator]:
    """Run ``model(*inputs, **kwargs)`` once, and list PyTorch's operators that kernels could have taken the place of.

    Of a model that isn't replaced, these are all that replacing may serve.  A row for each module, operator and reason,
    in the order of the first call.  The model runs in the mode that it is in, and changes as any call changes it.
    """
    names = {module: name for name, module in model.named_modules()}
    watch = _Watch()
    with observe_modules(watch.enter, watch.leave), observe_choices(watch.choose), watch:
        model(*inputs, **kwargs)
    return [
        LeftOperator(names.get(module, "-"), type(module).__name__, operator, calls, reason)
        for (module, operator, reason), calls in watch.seen.items()
    ]
