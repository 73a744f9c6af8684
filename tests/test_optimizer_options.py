"""What the optimizers do beyond stock's: clipping, penalties, averages, master weights."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.optimizers import in_both_paths, parameters, proximal, set_gradients
from torch import nn

from fusednn import optim


@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_clipping(name: str, factor: float, device: str) -> None:
    def run() -> None:
        mine, theirs = (parameters([(3, 4), (70,)], torch.float32, device) for _ in range(2))
        groups = [[{"params": params[:1]}, {"params": params[1:]}] for params in (mine, theirs)]
        ours = getattr(optim, name)(groups[0], lr=0.1, clip_norm=2.0, clip_value=0.2)
        stock = getattr(torch.optim, name)(groups[1], lr=0.1)
        for step in range(2):
            set_gradients(step, mine, theirs, scale=factor)
            before = [p.grad.clone() for p in mine]
            nn.utils.clip_grad_norm_(theirs, 2.0)
            nn.utils.clip_grad_value_(theirs, 0.2)
            ours.step()
            stock.step()
            torch.testing.assert_close([p.grad for p in mine], before, rtol=0, atol=0)
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-6)

    in_both_paths(run)


@pytest.mark.parametrize(
    "strengths",
    [(0.5, 0.0, 0.0), (0.5, 0.7, 0.0), (0.0, 0.0, 1.5), (0.2, 0.3, 1.0)],
    ids=["l1", "elastic", "group", "all"],
)
def test_penalties(strengths: tuple[float, float, float], device: str) -> None:
    def run() -> None:
        shapes = [(6, 9), (6, 6), (3, 2, 4, 5), (5,)]
        mine, theirs = (parameters(shapes, torch.float32, device) for _ in range(2))
        for params in (mine, theirs):
            params[2].data = params[2].data.contiguous(memory_format=torch.channels_last)
            # Rows that aren't runs of memory.
            params += [nn.Parameter(matrix.detach().clone().t()) for matrix in params[:2]]
        l1, l2, group_lasso = strengths
        ours = optim.SGD(mine, lr=0.3, momentum=0.9, l1=l1, l2=l2, group_lasso=group_lasso)
        stock = torch.optim.SGD(theirs, lr=0.3, momentum=0.9)
        for step in range(2):
            set_gradients(step, mine, theirs, scale=0.1)
            ours.step()
            stock.step()
            with torch.no_grad():
                for p in theirs:
                    p.copy_(proximal(p, 0.3, *strengths))
        assert any((p == 0).any() for p in theirs) or not (l1 or group_lasso)
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-6)

    in_both_paths(run)


def test_an_element_that_is_no_number_stays_alone(device: str) -> None:
    def run() -> None:
        (matrix, vector) = mine = parameters([(2, 3), (6,)], torch.float32, device)
        ours = optim.SGD(mine, lr=0.1, group_lasso=0.1)
        set_gradients(0, mine)
        for p in mine:
            p.grad.view(-1)[0] = float("nan")
        ours.step()
        assert vector.isnan().tolist() == [True, False, False, False, False, False]
        assert matrix.isnan().tolist() == [[True] * 3, [False] * 3]  # a group has one norm

    in_both_paths(run)


def test_options_do_not_go_with_differentiable_steps() -> None:
    with pytest.raises(ValueError, match="differentiable"):
        optim.SGD([nn.Parameter(torch.ones(3))], differentiable=True, l1=0.1)
    with pytest.raises(ValueError, match="differentiable"):
        optim.RMSprop([nn.Parameter(torch.ones(3))], differentiable=True, momentum=0.9, nesterov=True)


@pytest.mark.parametrize("averaging", ["mean", 0.9, 0.0])
def test_averages(averaging: str | float, device: str) -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    def run() -> None:
        torch.manual_seed(0)
        model = nn.Linear(5, 3).to(device)
        ours = optim.Adam(model.parameters(), lr=0.1, averaging=averaging, group_lasso=0.1)
        average = AveragedModel(model, multi_avg_fn=None if averaging == "mean" else get_ema_multi_avg_fn(averaging))
        for step in range(4):
            set_gradients(step, list(model.parameters()))
            ours.step()
            average.update_parameters(model)
        weights = [p.detach().clone() for p in model.parameters()]
        with ours.averaged_parameters():
            for p, q in zip(model.parameters(), average.module.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=2e-5, atol=1e-6)
            with pytest.raises(RuntimeError, match="leave averaged_parameters"):
                ours.step()
        for p, q in zip(model.parameters(), weights, strict=True):
            assert torch.equal(p, q)

    in_both_paths(run)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_master_weights(name: str, dtype: torch.dtype, device: str) -> None:
    def run() -> None:
        arguments = {"lr": 1e-3, **({"momentum": 0.9} if name == "SGD" else {})}
        mine = parameters([(3, 4)], dtype, device)
        masters = [nn.Parameter(p.detach().float()) for p in mine]
        ours = getattr(optim, name)(mine, master_weights=True, averaging=0.5, **arguments)
        stock = getattr(torch.optim, name)(masters, foreach=False, **arguments)
        for step in range(4):
            set_gradients(step, mine)
            masters[0].grad = mine[0].grad.float()
            ours.step()
            stock.step()
            torch.testing.assert_close(ours.state[mine[0]]["master"], masters[0].detach(), rtol=2e-5, atol=1e-7)
            assert torch.equal(mine[0], ours.state[mine[0]]["master"].to(dtype))
            if step == 1:  # exactly through a checkpoint
                fresh = getattr(optim, name)(mine, master_weights=True, averaging=0.5, **arguments)
                before = copy.deepcopy(ours.state_dict())
                fresh.load_state_dict(copy.deepcopy(before))
                for key, value in before["state"][0].items():
                    torch.testing.assert_close(fresh.state[mine[0]][key], value, rtol=0, atol=0)
                ours = fresh
        assert all(v.dtype == torch.float32 for v in ours.state[mine[0]].values())
        plain = getattr(torch.optim, name)(mine, **arguments)
        plain.load_state_dict(copy.deepcopy(ours.state_dict()))
        set_gradients(9, mine)
        plain.step()

    in_both_paths(run)


@pytest.mark.parametrize("centered", [False, True])
def test_rmsprop_with_nesterov_momentum(centered: bool, device: str) -> None:
    (p,) = mine = parameters([(50,)], torch.float64, device)
    ours = optim.RMSprop(mine, lr=0.1, momentum=0.8, centered=centered, nesterov=True)
    w, v, a, b = p.detach().clone(), *(torch.zeros(50, dtype=torch.float64, device=device) for _ in range(3))
    for step in range(3):
        set_gradients(step, mine)
        g = p.grad
        v = 0.99 * v + 0.01 * g * g
        a = 0.99 * a + 0.01 * g
        d = g / ((v - a * a if centered else v).sqrt() + 1e-8)
        b = 0.8 * b + d
        w = w - 0.1 * (d + 0.8 * b)
        ours.step()
        torch.testing.assert_close(p.detach(), w, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="Nesterov momentum"):
        optim.RMSprop(mine, nesterov=True)


# --- What has no meaning ----------------------------------------------------------------------------------------------

_MEANINGLESS = {
    "clip_norm": [0.0, -1.0, float("nan"), True, "1"],
    "clip_value": [0, -1.0],
    "l1": [-1.0, float("inf"), torch.tensor(0.1), None],
    "l2": [-1e-9],
    "group_lasso": [-1.0],
    "averaging": [1.0, -0.1, 2.0, "median", False, torch.tensor([0.5, 0.5])],
}


def _doors(name: str, value: Any) -> Iterator[tuple[str, Any, Callable[[], object]]]:
    """Each way that an option's value enters: what it is called, the optimizer if there is one, and the call."""

    def weight() -> nn.Parameter:
        parameter = nn.Parameter(torch.ones(3))
        parameter.grad = torch.ones(3)
        return parameter

    yield "constructor", None, lambda: optim.SGD([weight()], lr=0.1, **{name: value})
    unused = {"params": [weight()], name: optim.SGD.options[name]}
    yield "constructor, with a group of its own", None, lambda: optim.SGD([unused], lr=0.1, **{name: value})
    yield "group", None, lambda: optim.SGD([{"params": [weight()], name: value}], lr=0.1)
    ours = optim.SGD([weight()], lr=0.1)
    yield "add_param_group", ours, lambda: ours.add_param_group({"params": [weight()], name: value})
    loaded = optim.SGD([weight()], lr=0.1)
    state = loaded.state_dict()
    state["param_groups"][0] |= {name: value, "lr": 7.0}
    yield "load_state_dict", loaded, lambda: loaded.load_state_dict(state)
    assigned = optim.SGD([weight()], lr=0.1)
    assigned.param_groups[0][name] = value
    yield "step", assigned, assigned.step
    for again in (torch.optim.SGD([weight()], lr=0.1), optim.SGD([weight()], lr=0.1)):
        yield "replace", again, lambda again=again: optim.replace(again, **{name: value})
    stock = torch.optim.SGD([{"params": [weight()], name: value}], lr=0.1)
    yield "replace a group", stock, lambda: optim.replace(stock, l1=0.1)


def _facts(optimizer: Any) -> Any:
    """All that a call might have changed."""
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    weights = [p.tolist() for group in optimizer.param_groups for p in group["params"]]
    return type(optimizer), repr((optimizer.defaults, groups, weights, sorted(optimizer.__dict__)))


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in _MEANINGLESS.items() for value in values]
)
def test_options_without_meaning_change_nothing(name: str, value: Any) -> None:
    for door, optimizer, enter in _doors(name, value):
        before = None if optimizer is None else _facts(optimizer)
        with pytest.raises(ValueError, match=f"Invalid {name} value"):
            enter()
        assert optimizer is None or _facts(optimizer) == before, door


def test_nesterov_without_momentum_in_a_group() -> None:
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    with pytest.raises(ValueError, match="Nesterov momentum"):
        optim.RMSprop([{"params": weights[:1], "nesterov": True}])
    ours = optim.RMSprop(weights[:1], momentum=0.9, nesterov=True)
    with pytest.raises(ValueError, match="Nesterov momentum"):
        ours.add_param_group({"params": weights[1:], "momentum": 0.0})
    assert len(ours.param_groups) == 1
    ours.param_groups[0]["momentum"] = 0.0
    with pytest.raises(ValueError, match="Nesterov momentum"):
        ours.step()
    stock = torch.optim.RMSprop(weights)
    with pytest.raises(ValueError, match="Nesterov momentum"):
        optim.replace(stock, nesterov=True)
    assert type(stock) is torch.optim.RMSprop


def test_replacing_again_changes_what_groups_follow() -> None:
    weights = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    groups = [{"params": weights[:1]}, {"params": weights[1:2], "l1": 0.5}, {"params": weights[2:], "l1": 0.0}]
    ours = optim.replace(torch.optim.SGD(groups), l1=0.1)
    assert [group["l1"] for group in ours.param_groups] == [0.1, 0.5, 0.0]
    optim.replace(ours, l1=0.2)
    assert [group["l1"] for group in ours.param_groups] == [0.2, 0.5, 0.0]
    optim.replace(ours, l1=0.0)
    assert [group.get("l1") for group in ours.param_groups] == [None, 0.5, 0.0]
    assert "l1" not in ours.defaults


def test_options_survive_a_stock_state_dict(device: str) -> None:
    mine, theirs = (parameters([(3,)], torch.float32, device) for _ in range(2))
    ours, stock = optim.Adam(mine, clip_norm=1.0), torch.optim.Adam(theirs)
    set_gradients(0, theirs)
    stock.step()
    ours.load_state_dict(stock.state_dict())
    assert ours.param_groups[0]["clip_norm"] == 1.0
