"""Training steps of whole networks: what is measured, and how.

Each contestant has a network of its own, of the same weights: eager PyTorch's, fusednn's (`replace_layers` with
``fuse=True``), both compiled, and fusednn's with results that are made again.  A step is zeroing gradients, forward,
loss, backward and an SGD step with momentum.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusednn.benchmark.counting import counts_of, operators_of_cuda
from fusednn.benchmark.protocol import COMPILE_MODES, Contest, Effort, NamedCase, WrongResultError
from fusednn.benchmark.timing import DEVICE, DeviceTimer, interleave, wall_times

__all__ = [
    "FirstResult",
    "Network",
    "NetworkCase",
    "StockMaxout",
    "count_network_case",
    "run_network_contest",
    "to_fusednn",
]

#: Farthest that a loss, and the gradient of all parameters, may be from float64's: maxima that a rounding decides send
#: gradients another way.
_LOSS_LIMIT = {torch.bfloat16: 0.02, torch.float32: 1e-3}
_GRADIENT_LIMIT = {torch.bfloat16: 0.3, torch.float32: 0.02}
_CALLS = 4  # steps that are timed together


class StockMaxout(nn.Module):
    """`fusednn.layers.Maxout` in plain PyTorch, with its parameters."""

    def __init__(self, in_features: int, out_features: int, pieces: int) -> None:
        super().__init__()
        layers = [nn.Linear(in_features, out_features) for _ in range(pieces)]
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers]))

    def forward(self, x: Tensor) -> Tensor:
        products = F.linear(x, self.weight.flatten(0, 1), self.bias.flatten())
        return products.unflatten(-1, self.bias.shape).amax(-2)


def to_fusednn(model: nn.Module, *, recompute: bool = False) -> nn.Module:
    """A copy of ``model`` with fusednn's layers, neighbours fused; with results that are made again, or kept."""
    import fusednn

    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, StockMaxout):
                pieces, units, features = child.weight.shape
                maxout = fusednn.layers.Maxout(features, units, pieces).to(child.weight.device, child.weight.dtype)
                maxout.load_state_dict(child.state_dict())
                setattr(parent, name, maxout)
    fusednn.replace_layers(model, fuse=True, recompute=recompute)
    return model


class FirstResult(nn.Module):
    """A block of transformers, which may return a tuple, by its first result."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        first: Tensor = y[0] if isinstance(y, tuple) else y
        return first


@dataclass(frozen=True)
class Network:
    """``build(width, classes)`` makes the stock network; ``images(batch, size)`` what goes in."""

    name: str
    build: Callable[[int], nn.Module]
    images: Callable[[int, int], Tensor]
    classes: int = 10
    family: str = "network"


@dataclass(frozen=True)
class NetworkCase(NamedCase):
    """A network of a width on a batch of images of a size.  ``bf16`` is autocast's, with float32 parameters."""

    operation: Network
    dtype: torch.dtype
    size: str
    width: int
    batch: int
    image: int

    def contestants(self, usual: tuple[str, ...]) -> tuple[str, ...]:
        """The usual ones, ours compiled, and ours with results that are made again: what these take from the peak."""
        return (*usual, "fusednn-compile", "fusednn-recompute")

    def record(self, contestant: str) -> dict[str, Any]:
        return {
            **self.named(contestant, "training_step", self.operation.images(self.batch, self.image).shape),
            "channels_last": True,
            "autocast": self.dtype is torch.bfloat16,
            "images": self.batch,
            "budget_bytes": 0,
            "operations": 0,
        }


class Trainer:
    """One contestant's network, and its training step."""

    def __init__(self, case: NetworkCase, contestant: str, device: torch.device, exact: bool = False) -> None:
        torch.manual_seed(0)
        model = case.operation.build(case.width)
        images = case.operation.images(case.batch, case.image)
        target = torch.arange(case.batch) % case.operation.classes
        dtype = torch.float64 if exact else torch.float32
        model = model.to(device, dtype, memory_format=torch.channels_last)
        self.images, self.target = images.to(device, dtype), target.to(device)
        if images.dim() == 4:
            self.images = self.images.contiguous(memory_format=torch.channels_last)
        self.ours = contestant.startswith("fusednn")
        self.model = to_fusednn(model, recompute=contestant == "fusednn-recompute") if self.ours else model
        self.call: Callable[[Tensor], Tensor] = self.model
        if mode := contestant.removeprefix("fusednn-") if "compile" in contestant else None:
            self.call = torch.compile(self.model, dynamic=False, mode=COMPILE_MODES[mode])
        self.autocast = case.dtype is torch.bfloat16 and not exact
        self.optimizer = self._optimizer(device)

    def _optimizer(self, device: torch.device) -> torch.optim.Optimizer:
        parameters = list(self.model.parameters())
        if self.ours:
            from fusednn import optim

            return optim.SGD(parameters, lr=1e-3, momentum=0.9)
        # Stock's fastest; on a CPU, where nothing is timed, what a GPU takes by itself.
        fastest = {"fused": True} if device.type == "cuda" else {"foreach": True}
        return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, **fastest)

    def forward(self) -> Tensor:
        device = self.images.device.type
        with torch.autocast(device, torch.bfloat16) if self.autocast else nullcontext():
            scores = self.call(self.images)
            if self.ours:
                from fusednn.autograd import cross_entropy

                return cross_entropy(scores, self.target)
            return F.cross_entropy(scores, self.target)

    def step(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.forward()
        loss.backward()
        self.optimizer.step()
        return loss

    def without_dropout(self) -> Trainer:
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return self


def check(case: NetworkCase, contestant: str, device: torch.device) -> float:
    """Loss and gradients of the first step, without dropout, against eager's in float64.

    Returns the loss's error in epsilons; raises WrongResultError where either is too far.
    """
    found, expected = (Trainer(case, *who).without_dropout() for who in ((contestant, device), ("eager", device, True)))
    losses = []
    for trainer in (found, expected):
        loss = trainer.forward()
        loss.backward()
        losses.append(float(loss.detach()))
    ours, exact = (torch.cat([p.grad.double().flatten() for p in t.model.parameters()]) for t in (found, expected))
    error, apart = abs(losses[0] - losses[1]) / abs(losses[1]), float((ours - exact).norm() / exact.norm())
    if not (error <= _LOSS_LIMIT[case.dtype] and apart <= _GRADIENT_LIMIT[case.dtype]):
        raise WrongResultError(f"{case.id}: the loss is {error:.2%}, the gradient {apart:.2%} from eager PyTorch's")
    return error / torch.finfo(case.dtype).eps


def run_network_contest(case: NetworkCase, timer: DeviceTimer, names: tuple[str, ...], effort: Effort) -> Contest:
    """Check every contestant; time those that are right, in turns."""
    torch._dynamo.reset()
    contest = Contest()
    trainers: dict[str, Trainer] = {}
    errors: dict[str, float] = {}
    for name in names:
        try:
            errors[name] = check(case, name, DEVICE)
            trainers[name] = Trainer(case, name, DEVICE)
            trainers[name].step()
        except Exception as error:
            contest.leave_out(name, error)
            trainers.pop(name, None)

    def device(trainer: Trainer) -> list[float]:
        return timer.sample(lambda: [trainer.step] * _CALLS)

    def wall(trainer: Trainer) -> list[float]:
        return wall_times(lambda: [trainer.step] * _CALLS, torch.cuda.synchronize)

    interleave(trainers, effort.warmup_rounds, device)
    device_us = interleave(trainers, effort.large_rounds, device)
    wall_us = interleave(trainers, effort.host_rounds, wall)
    contest.records = [
        {
            **case.record(name),
            "device_us": device_us[name],
            "host_us": [],
            "wall_us": wall_us[name],
            "calls_per_sample": 1,
            "sets": 1,
            "rotated_bytes": 0,
            **_memory(trainer),
            "error_epsilons": errors[name],
        }
        for name, trainer in trainers.items()
    ]
    del trainers
    gc.collect()
    torch.cuda.empty_cache()
    return contest


def _memory(trainer: Trainer) -> dict[str, int]:
    """Bytes that a step takes at its peak beside what was there before, and that its forward pass keeps."""
    trainer.optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = trainer.forward()
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    trainer.optimizer.step()
    torch.cuda.synchronize()
    return {"peak_bytes": torch.cuda.max_memory_allocated() - before, "kept_bytes": kept}


def count_network_case(case: NetworkCase, *, checked: bool = True) -> list[dict[str, Any]]:
    """Records of fusednn and eager; after checking fusednn's loss and gradients, where that isn't left out."""
    records = [_count(case, contestant) for contestant in ("fusednn", "eager")]
    if checked:
        records[0]["error_epsilons"] = check(case, "fusednn", torch.device("cpu"))
    return records


def _count(case: NetworkCase, contestant: str) -> dict[str, Any]:
    """A record of a step that isn't the optimizer's first, which makes its state.

    Activations are what autograd saves, parameters and images apart.
    """
    from fusednn.instruments.saved_tensors import saved_tensors
    from fusednn.instruments.traffic import measure_traffic

    trainer = Trainer(case, contestant, torch.device("cpu"))
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    with operators_of_cuda(), measure_traffic() as traffic, saved_tensors() as census:
        trainer.step()
    return {
        **case.record(contestant),
        "elements": trainer.images.numel(),
        "saved_bytes": census.bytes_beside(*trainer.model.parameters(), trainer.images),
        **counts_of(traffic),
    }
