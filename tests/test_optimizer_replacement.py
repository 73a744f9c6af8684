"""Stock optimizers that become ours in place."""

import warnings

import pytest
import torch
from support.optimizers import (
    SHAPES,
    TOLERANCE,
    assert_like_stock,
    every_name,
    parameters,
    set_gradients,
    stock_of,
)
from torch import nn

from fusednn import optim


@every_name
def test_replace(name: str, device: str) -> None:
    mine, theirs = (parameters(SHAPES, torch.float32, device) for _ in range(2))
    ours = stock_of(name, mine, foreach=None)
    stock = stock_of(name, theirs)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in (ours, stock)]
    for step in range(4):
        set_gradients(step, mine, theirs)
        ours.step()
        stock.step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for schedule in schedules:
                schedule.step()
        if step == 1:
            replaced = optim.replace(ours)
            assert replaced is ours
            assert type(ours) is getattr(optim, name)
    assert_like_stock(ours, stock, **TOLERANCE[torch.float32])


def test_replace_refuses() -> None:
    """And then leaves the optimizer as it was."""
    weights = [nn.Parameter(torch.ones(3))]
    stepped = torch.optim.SGD(weights)
    stepped.step = lambda: None
    for optimizer, options, error, message in (
        (torch.optim.LBFGS(weights), {}, TypeError, "LBFGS has no fusednn twin"),
        (type("Mine", (torch.optim.SGD,), {})(weights), {}, TypeError, "Mine has no fusednn twin"),
        (torch.optim.Adam(weights), {"nesterov": True}, TypeError, "no option nesterov"),
        (torch.optim.Adam(weights), {"l1": 0.1, "lr": 0.1}, TypeError, "no option lr"),
        (stepped, {}, ValueError, "overridden"),
    ):
        cls, known, defaults = type(optimizer), dict(optimizer.__dict__), dict(optimizer.defaults)
        with pytest.raises(error, match=message):
            optim.replace(optimizer, **options)
        assert type(optimizer) is cls
        assert optimizer.__dict__ == known
        assert optimizer.defaults == defaults
    assert optim.replace(torch.optim.Adam(weights), clip_norm=1.0).param_groups[0]["clip_norm"] == 1.0


def test_new_options_are_checked_where_old_ones_are_right() -> None:
    """Of an optimizer that has them already."""
    ours = optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1, l1=0.5)
    with pytest.raises(ValueError, match="Invalid l1 value"):
        optim.replace(ours, l1=-1.0)
    assert ours.param_groups[0]["l1"] == 0.5


def test_schedulers_of_a_replaced_optimizer_see_its_steps(device: str) -> None:
    """They warn where they step before the optimizer has."""
    (p,) = parameters([(3,)], torch.float32, device)
    optimizer = torch.optim.SGD([p], lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optim.replace(optimizer)
    p.grad = torch.ones_like(p)
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()
