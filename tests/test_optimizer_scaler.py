"""The optimizers with gradients that a scaler scaled."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from support.device import KERNELS_RUN
from support.gpu import compiled_kernels, no_synchronisation
from support.optimizers import (
    assert_like_stock,
    every_name,
    in_both_paths,
    parameters,
    proximal,
    set_gradients,
    stock_of,
)
from torch import Tensor, nn

from fusednn import optim


def _scaled_training(optimizer: Any, params: Sequence[Tensor], device: str) -> Iterator[tuple[Any, bool]]:
    """Five steps, of which two overflow: the scaler after each, and whether it called the optimizer's step."""
    scaler = torch.amp.GradScaler(device, init_scale=8.0, growth_interval=2)
    calls = []
    step = optimizer.step
    optimizer.step = lambda *arguments, **keywords: calls.append(0) or step(*arguments, **keywords)
    for i in range(5):
        optimizer.zero_grad()
        loss = sum((p**3).sum() for p in params) * (float("inf") if i in (0, 2) else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        yield scaler, bool(calls)
        calls.clear()


@every_name
def test_grad_scaler_unscales_and_skips_as_with_stock(name: str, device: str) -> None:
    """Scripts log gradients after the step, and wrappers take a step that isn't called for one that was skipped."""
    arguments = {"lr": 0.1, **({"momentum": 0.9} if name == "SGD" else {})}
    mine, theirs = (parameters([(4,), (3,)], torch.float32, device) for _ in range(2))
    ours = getattr(optim, name)(mine, clip_norm=1e6, **arguments)
    stock = stock_of(name, theirs, **arguments)
    trainings = [_scaled_training(ours, mine, device), _scaled_training(stock, theirs, device)]
    for (scaler, called), (stock_scaler, stock_called) in zip(*trainings, strict=True):
        assert not getattr(ours, "_step_supports_amp_scaling", False)  # who clips unscaled gradients asks for this
        assert called == stock_called
        assert scaler.get_scale() == stock_scaler.get_scale()
        torch.testing.assert_close([p.grad for p in mine], [p.grad for p in theirs], rtol=1e-4, atol=1e-5)
        assert_like_stock(ours, stock, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam", "AdamW"])
def test_a_fused_step_takes_over_from_a_grad_scaler(name: str, device: str) -> None:
    """And leaves gradients unscaled, as stock's fused kernels do, or as they were where the step was skipped."""
    arguments = {"lr": 0.1, **({"momentum": 0.9, "weight_decay": 0.1, "maximize": True} if name == "SGD" else {})}
    mine, theirs = (parameters([(4,), (3, 3)], torch.float32, device) for _ in range(2))
    ours = getattr(optim, name)(mine, fused=True, clip_norm=1e6, **arguments)
    stock = getattr(torch.optim, name)(theirs, fused=True, **arguments)
    for step in range(3):
        overflow = step == 1  # not the first: stock's momentum would start with what was in memory
        set_gradients(step, mine, theirs, scale=8.0)
        for optimizer, params in ((ours, mine), (stock, theirs)):
            scaler = torch.amp.GradScaler(device, init_scale=8.0)
            scaler.scale(torch.ones((), device=device))
            if overflow:
                params[0].grad[0] = float("inf")
            if optimizer is ours:
                params[1].grad = torch.cat([params[1].grad] * 2, dim=1)[:, :3]
                assert optimizer._step_supports_amp_scaling is KERNELS_RUN
            versions = [p.grad._version for p in params]
            scaler.step(optimizer)
            if optimizer is ours and KERNELS_RUN:
                assert [p.grad._version > v for p, v in zip(params, versions, strict=True)] == [True, True]
        if KERNELS_RUN or not overflow:  # else the scaler has unscaled
            torch.testing.assert_close([p.grad for p in mine], [p.grad for p in theirs], rtol=1e-6, atol=0)
        assert_like_stock(ours, stock, rtol=2e-5, atol=1e-6)


def test_grad_scaler_without_gradients(device: str) -> None:
    scaler = torch.amp.GradScaler(device)
    ours = optim.SGD(parameters([(4,)], torch.float32, device))
    scaler.scale(torch.ones((), device=device))
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.step(ours)


def test_grad_scaler_and_options(device: str) -> None:
    """What the options do, they do to unscaled gradients, and not at all after an overflow."""

    def run() -> None:
        dtype = torch.bfloat16
        (p,) = parameters([(4, 3)], dtype, device)
        (weights,) = stock_parameters = [nn.Parameter(p.detach().float())]
        ours = optim.Adam([p], lr=0.1, clip_norm=0.5, clip_value=0.3, l1=0.2, averaging="mean", master_weights=True)
        stock = torch.optim.Adam(stock_parameters, lr=0.1)
        mean = torch.zeros(4, 3, device=device)
        for step in range(4):
            set_gradients(step, stock_parameters)
            overflow = step in (0, 2)
            p.grad = (weights.grad * (float("inf") if overflow else 8.0)).to(dtype)
            weights.grad = p.grad.float() / 8.0
            scaler = torch.amp.GradScaler(device, init_scale=8.0)
            scaler.scale(torch.ones((), device=device))
            scaler.step(ours)
            if overflow:
                continue
            nn.utils.clip_grad_norm_(stock_parameters, 0.5)
            nn.utils.clip_grad_value_(stock_parameters, 0.3)
            stock.step()
            with torch.no_grad():
                weights.copy_(proximal(weights, 0.1, 0.2, 0.0, 0.0))
                mean += (weights - mean) / stock.state[weights]["step"].to(device)
        state = ours.state[p]
        torch.testing.assert_close(state["master"], weights.detach(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(state["average"], mean, rtol=1e-3, atol=1e-4)
        assert state["averages"].item() == state["step"].item() == 2

    in_both_paths(run)


def test_grad_scaler_takes_float16_gradients_for_master_weights_only(device: str) -> None:
    for options in ({}, {"master_weights": True}):
        (p,) = parameters([(4,)], torch.float16, device)
        ours = optim.SGD([p], lr=1.0, **options)
        p.grad = torch.ones_like(p)
        scaler = torch.amp.GradScaler(device, init_scale=8.0)
        scaler.scale(torch.ones((), device=device))
        if options and KERNELS_RUN:
            before = p.detach().clone()
            scaler.step(ours)
            torch.testing.assert_close(p.detach(), before - 0.125)
        else:
            with pytest.raises(ValueError, match="unscale FP16"):  # stock's error
                scaler.step(ours)


@pytest.mark.kernels
@every_name
def test_steps_that_overflow_count_for_nothing(name: str, device: str) -> None:
    """Of master weights, whose scaled gradients only the kernels have seen: the others are stock's of float32."""
    arguments = {"lr": 0.1, **({"momentum": 0.9} if name in ("SGD", "RMSprop") else {})}
    mine = parameters([(4,), (3, 3)], torch.float16, device)
    theirs = [nn.Parameter(p.detach().float()) for p in mine]
    ours, stock = getattr(optim, name)(mine, master_weights=True, **arguments), stock_of(name, theirs, **arguments)
    scaler = torch.amp.GradScaler(device, init_scale=8.0, growth_interval=100)
    scaler.scale(torch.ones((), device=device))
    for step in range(5):
        set_gradients(step, mine)
        for p, master in zip(mine, theirs, strict=True):
            master.grad = p.grad.float()
            p.grad *= scaler.get_scale() if step not in (0, 2) else float("inf")
        scaler.step(ours)
        scaler.update()
        if step not in (0, 2):
            stock.step()
    masters = [ours.state[p]["master"] for p in mine]
    torch.testing.assert_close(masters, [p.detach() for p in theirs], rtol=2e-5, atol=1e-6)


def test_a_dampened_first_step_that_overflows(device: str) -> None:
    arguments = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    mine, theirs = (parameters([(4,)], torch.float32, device) for _ in range(2))
    ours, stock = optim.SGD(mine, **arguments), torch.optim.SGD(theirs, foreach=False, **arguments)
    for optimizer, params in ((ours, mine), (stock, theirs)):
        scaler = torch.amp.GradScaler(device, init_scale=8.0)
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale(sum((p**3).sum() for p in params) * (float("inf") if step == 0 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
    torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_grad_scaler_waits_for_nothing(name: str, device: str) -> None:
    mine = parameters([(300,), (4, 5)], torch.float32, device)
    ours = getattr(optim, name)(mine, clip_norm=1.0, fused=True)
    scaler = torch.amp.GradScaler(device, init_scale=8.0)

    def train() -> None:
        scaler.scale(sum((p**2).sum() for p in mine)).backward()
        scaler.step(ours)
        scaler.update()
        ours.zero_grad()

    for _ in range(2):
        train()
    compiled = compiled_kernels("optimizer")
    with no_synchronisation():
        for _ in range(50):
            train()
    assert compiled_kernels("optimizer") == compiled
