"""A step that repeats the one before: it does so where it may, and notices whatever could make it stale."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from support.optimizers import CALLS, NAMES, parameters, set_gradients, twins_of
from torch import Tensor, nn

from fusednn import optim

pytestmark = pytest.mark.kernels

SHAPES = [(3, 4), (5,), (2, 3)]
OPTIONS: list[dict[str, Any]] = [
    {"clip_norm": 0.5},
    {"clip_value": 0.1, "l1": 0.01},
    {"group_lasso": 0.01, "averaging": 0.9},
    {"averaging": "mean", "l2": 0.1},
]

Change = Callable[[torch.optim.Optimizer], None]


def repeats(optimizer: torch.optim.Optimizer) -> bool:
    """Take a step, and tell whether it repeated the one before."""
    with mock.patch.object(optim.FusedOptimizer, "_plan_step", autospec=True, side_effect=PLAN) as plan:
        optimizer.step()
    return not plan.called


PLAN = optim.FusedOptimizer._plan_step


def plans(optimizer: Any) -> None:
    optimizer.__dict__.pop("_remembered", None)
    optimizer.step()


def assert_same_bits(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    for mine, theirs in zip(one.param_groups, other.param_groups, strict=True):
        for p, q in zip(mine["params"], theirs["params"], strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=0)
            assert one.state[p].keys() == other.state[q].keys()
            for key, value in one.state[p].items():
                torch.testing.assert_close(value, other.state[q][key], rtol=0, atol=0)


def pair(name: str, device: str, **arguments: Any) -> tuple[Any, Any]:
    first = parameters(SHAPES, torch.float32, device)
    return tuple(getattr(optim, name)(ps, **copy.deepcopy(arguments)) for ps in (first, twins_of(first)))


def in_step(one: Any, other: Any, step: int) -> None:
    set_gradients(step, *([p for group in o.param_groups for p in group["params"]] for o in (one, other)))


#: Options are the same code for all.
RUNS = [(name, arguments, {}) for _, name, arguments in CALLS]
RUNS += [(name, {"lr": 0.1}, options) for name in ("Adam", "SGD") for options in OPTIONS]


@pytest.mark.parametrize(("name", "arguments", "options"), RUNS)
def test_repeated_steps_have_the_bits_of_planned_ones(
    name: str, arguments: dict[str, Any], options: dict[str, Any], device: str
) -> None:
    ours, planned = pair(name, device, **arguments, **options)
    for step in range(5):
        in_step(ours, planned, step)
        # The first step makes the state, unless there is none or the constructor made it; the next one the plan.
        stateless = name == "Adagrad" or (name == "SGD" and "momentum" not in arguments)
        assert repeats(ours) == (step > (0 if stateless else 1)), step
        plans(planned)
    assert_same_bits(ours, planned)


@pytest.mark.parametrize("scaled", [False, True])
def test_master_weights_and_gradient_scalers(scaled: bool, device: str) -> None:
    first = parameters(SHAPES, torch.float16, device)
    ours, planned = (optim.Adam(ps, lr=0.1, master_weights=True) for ps in (first, twins_of(first)))
    for step in range(5):
        in_step(ours, planned, step)
        for optimizer in (ours, planned):
            if scaled:
                optimizer.grad_scale = torch.tensor(8.0, device=device)  # type: ignore[attr-defined]
                optimizer.found_inf = torch.tensor(float(step == 3), device=device)  # type: ignore[attr-defined]
        assert repeats(ours) == (step > 1)
        plans(planned)
    assert_same_bits(ours, planned)
    for p, q in zip(ours.param_groups[0]["params"], planned.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)  # unscaled


def weight(optimizer: torch.optim.Optimizer, place: int = 0) -> Any:
    return optimizer.param_groups[0]["params"][place]


def state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    own: dict[str, Any] = optimizer.state[weight(optimizer)]
    return own


def set_value(name: str, value: Any) -> Change:
    return lambda optimizer: optimizer.param_groups[0].__setitem__(name, value)


def move_data(optimizer: torch.optim.Optimizer) -> None:
    weight(optimizer).data = weight(optimizer).data.clone()


def transpose(optimizer: torch.optim.Optimizer) -> None:
    """In place: the address stays."""
    weight(optimizer).data = weight(optimizer).data.view(4, 3).t()


def replace_state(optimizer: torch.optim.Optimizer) -> None:
    state(optimizer)["exp_avg"] = state(optimizer)["exp_avg"] * 2


def transpose_state(optimizer: torch.optim.Optimizer) -> None:
    average = state(optimizer)["exp_avg"]
    average.set_(average.untyped_storage(), 0, (3, 4), (1, 3))


def replace_dictionary(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[weight(optimizer)] = {key: value.clone() * 2 for key, value in state(optimizer).items()}


def forget(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[weight(optimizer)] = {}


def load(optimizer: torch.optim.Optimizer) -> None:
    loaded = copy.deepcopy(optimizer.state_dict())
    loaded["state"][0]["exp_avg"].mul_(2)
    optimizer.load_state_dict(loaded)


def add_group(optimizer: torch.optim.Optimizer) -> None:
    parameter = nn.Parameter(torch.ones(3, device=weight(optimizer).device))
    optimizer.add_param_group({"params": [parameter], "lr": 0.5})


def remove_parameter(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["params"].pop()


def swap_parameters(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["params"].reverse()


def move_step(optimizer: torch.optim.Optimizer) -> None:
    state(optimizer)["step"].fill_(40.0)


def replace_step(optimizer: torch.optim.Optimizer) -> None:
    state(optimizer)["step"] = torch.tensor(40.0)


def write_in_place(optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        weight(optimizer).mul_(2)
        state(optimizer)["exp_avg"].mul_(2)


#: What changes between steps, where the next step may still repeat the one before.
REPEATED: dict[str, Change] = {
    "learning rate": set_value("lr", 0.03),
    "learning rate as a tensor": lambda o: set_value("lr", torch.tensor(0.03))(o),
    "betas": set_value("betas", (0.5, 0.9)),
    "weight decay of another strength": set_value("weight_decay", 0.2),
    "the other direction": set_value("maximize", True),
    "a counter's value": move_step,
    "values in place": write_in_place,
}
#: And where it may not.
CHANGES: dict[str, Change] = {
    **REPEATED,
    "no weight decay": set_value("weight_decay", 0),
    "a penalty": set_value("l1", 0.1),
    "a limit": set_value("clip_value", 0.01),
    "an average": set_value("averaging", 0.5),
    "moved data": move_data,
    "transposed": transpose,
    "a replaced state": replace_state,
    "a transposed state": transpose_state,
    "a replaced dictionary": replace_dictionary,
    "a forgotten state": forget,
    "a loaded state": load,
    "another group": add_group,
    "a parameter less": remove_parameter,
    "another order": swap_parameters,
    "another counter": replace_step,
}
#: Behind which the next step but one can't repeat the next either: it is another first step, or works on copies.
TWO_STEPS = ("a forgotten state", "another group", "transposed", "a transposed state")


@pytest.mark.whole
@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_between_steps_is_noticed(name: str, device: str) -> None:
    change = CHANGES[name]
    ours, planned = pair("Adam", device, lr=0.1, weight_decay=0.1)
    for step in range(6):
        if step == 4:
            change(ours)
            change(planned)
        in_step(ours, planned, step)
        assert repeats(ours) == (step > 1 and (name in REPEATED or step < 4 or (step == 5 and name not in TWO_STEPS)))
        plans(planned)
    assert_same_bits(ours, planned)


def no_gradient(gradient: Tensor) -> None:
    return None


def negated(gradient: Tensor) -> Tensor:
    return torch._neg_view(-gradient)


def transposed(gradient: Tensor) -> Tensor:
    return gradient.t().contiguous().t()


def sliced(gradient: Tensor) -> Tensor:
    return torch.stack([gradient, gradient], -1)[..., 0]


def expanded(gradient: Tensor) -> Tensor:
    return gradient[:1].expand_as(gradient)


def sparse(gradient: Tensor) -> Tensor:
    return gradient.to_sparse(1)


class Marked(Tensor):
    """A subclass, whose operators could be anything."""


def marked(gradient: Tensor) -> Tensor:
    return gradient.as_subclass(Marked)


@pytest.mark.parametrize(
    "gradient", [no_gradient, negated, transposed, sliced, expanded, sparse, marked], ids=lambda f: f.__name__
)
def test_gradients_of_another_kind_are_noticed(gradient: Callable[[Tensor], Any], device: str) -> None:
    ours, planned = pair("SGD", device, lr=0.1, momentum=0.9)
    for step in range(6):
        in_step(ours, planned, step)
        if step == 3:
            for optimizer in (ours, planned):
                weight(optimizer).grad = gradient(weight(optimizer).grad)
        assert repeats(ours) == (step in (2, 5)), step
        plans(planned)
    assert_same_bits(ours, planned)


def test_gradients_that_come_and_go_are_noticed(device: str) -> None:
    """A parameter that had none gets one, and loses it again."""
    ours, planned = pair("Adam", device, lr=0.1)
    for step in range(9):
        in_step(ours, planned, step)
        if step not in (3, 4, 5):
            weight(ours, 1).grad = weight(planned, 1).grad = None
        assert repeats(ours) == (step in (2, 5, 7, 8)), step
        plans(planned)
    assert_same_bits(ours, planned)


def test_new_gradients_are_read_where_they_are(device: str) -> None:
    """The same objects with other numbers, other objects, and both at once."""
    ours, planned = pair("RMSprop", device, lr=0.1)
    for step in range(6):
        if step % 2:
            for optimizer in (ours, planned):
                for parameter in optimizer.param_groups[0]["params"]:
                    parameter.grad.mul_(-3)
        else:
            in_step(ours, planned, step)
        assert repeats(ours) == (step > 1)
        plans(planned)
    assert_same_bits(ours, planned)


@pytest.mark.parametrize("value", [float("inf"), torch.tensor([0.1]), "0.1"])
def test_hyperparameters_that_kernels_do_not_take(value: Any, device: str) -> None:
    ours, _ = pair("SGD", device, lr=0.1)
    for step in range(3):
        in_step(ours, ours, step)
        ours.step()
    ours.param_groups[0]["lr"] = value
    try:
        assert not repeats(ours)
    except Exception:
        assert isinstance(value, str)  # stock's own


def test_options_are_checked_in_repeated_steps_too(device: str) -> None:
    ours, _ = pair("SGD", device, lr=0.1, l1=0.1)
    for step in range(3):
        in_step(ours, ours, step)
        ours.step()
    ours.param_groups[0]["l1"] = -0.1
    with pytest.raises(ValueError, match="l1"):
        ours.step()


def test_gradients_are_not_kept_alive(device: str) -> None:
    ours, _ = pair("Adam", device, lr=0.1)
    for step in range(4):
        in_step(ours, ours, step)
        ours.step()
    gradient = weakref.ref(weight(ours).grad.untyped_storage())
    ours.zero_grad(set_to_none=True)
    gc.collect()
    assert gradient() is None


def test_counters_stay_the_tensors_that_they_were(device: str) -> None:
    ours, _ = pair("Adam", device, lr=0.1)
    counters = []
    for step in range(4):
        in_step(ours, ours, step)
        ours.step()
        counters.append([ours.state[p]["step"] for p in ours.param_groups[0]["params"]])
    assert all(one is other for later in counters for one, other in zip(later, counters[0], strict=True))
    state(ours)["step"].fill_(9.0)
    assert [float(step) for step in counters[0]] == [9.0, 4.0, 4.0]
    assert not any(step._is_view() for step in counters[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: torch.load(_saved(o), weights_only=False)])
def test_copies_and_saved_states_do_not_share_counters(copied: Callable[[Any], Any], device: str) -> None:
    ours, _ = pair("Adam", device, lr=0.1)
    for step in range(4):
        in_step(ours, ours, step)
        ours.step()
    known = copied(ours.state_dict())
    in_step(ours, ours, 4)
    ours.step()
    assert [float(own["step"]) for own in known["state"].values()] == [4.0, 4.0, 4.0]
    ours.load_state_dict(known)
    in_step(ours, ours, 5)
    ours.step()
    assert float(state(ours)["step"]) == 5.0


def _saved(state: Any) -> Any:
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("name", NAMES)
def test_hooks_and_closures_are_called_in_every_step(name: str, device: str) -> None:
    ours, _ = pair(name, device, lr=0.1)
    called = []
    ours.register_step_pre_hook(lambda *_: called.append("before"))
    ours.register_step_post_hook(lambda *_: called.append("after"))

    def closure() -> Tensor:
        in_step(ours, ours, len(called))
        called.append("closure")
        return torch.tensor(float(len(called)))

    losses = [float(ours.step(closure)) for _ in range(4)]
    assert called == ["before", "closure", "after"] * 4
    assert losses == [2.0, 5.0, 8.0, 11.0]
