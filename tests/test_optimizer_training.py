"""The optimizers in a training loop: state, schedules, shards, graph capture."""

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import product
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from support.device import KERNELS_RUN, ON_GPU
from support.gpu import capture, compiled_kernels, no_synchronisation
from support.optimizers import (
    SHAPES,
    TOLERANCE,
    assert_like_stock,
    every_name,
    parameters,
    proximal,
    set_gradients,
    stock_of,
)
from torch import Tensor, nn

from fusednn import kernels, optim

# --- In a training loop -----------------------------------------------------------------------------------------------


@every_name
@pytest.mark.parametrize("first", ["ours", "stock"])
def test_state_dict_both_ways(name: str, first: str, device: str) -> None:
    mine, theirs = (parameters(SHAPES, torch.float32, device) for _ in range(2))
    ours = getattr(optim, name)(mine)
    stock = stock_of(name, theirs)
    source, target = (ours, stock) if first == "ours" else (stock, ours)
    for step in range(2):
        set_gradients(step, mine, theirs)
        source.step()
    with torch.no_grad():
        for p, q in zip(source.param_groups[0]["params"], target.param_groups[0]["params"], strict=True):
            q.copy_(p)
    assert source.state_dict()["param_groups"][0].keys() == target.state_dict()["param_groups"][0].keys()
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    set_gradients(5, mine, theirs)
    ours.step()
    stock.step()
    assert_like_stock(ours, stock, **TOLERANCE[torch.float32])


@every_name
def test_copies_and_pickles(name: str, device: str) -> None:
    mine = parameters(SHAPES, torch.float32, device)
    ours = getattr(optim, name)(mine, clip_norm=0.5, averaging=0.9)
    set_gradients(0, mine)
    ours.step()
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    duplicates = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(saved, weights_only=False)]
    set_gradients(1, mine)
    ours.step()
    for duplicate in duplicates:
        theirs = duplicate.param_groups[0]["params"]
        set_gradients(1, theirs)
        duplicate.step()
        for p, q in zip(mine, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=0)
        with duplicate.averaged_parameters():
            pass


def test_schedulers_closures_hooks_and_groups(device: str) -> None:
    results = []
    for module in (optim, torch.optim):
        mine = parameters([(4,), (3,), (5,)], torch.float32, device)
        optimizer = module.Adam([{"params": mine[:1], "lr": 0.1}, {"params": mine[1:2], "weight_decay": 0.2}])
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.1, 0.2], total_steps=10)
        calls = []
        optimizer.register_step_pre_hook(lambda *_, calls=calls: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append("after"))

        def closure(mine: list = mine, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = sum((p**2).sum() for p in mine[:2])
            loss.backward()
            return loss

        losses = []
        for step in range(4):
            losses.append(optimizer.step(closure).item())
            schedule.step()
            if step == 1:
                optimizer.add_param_group({"params": mine[2:], "lr": 0.01})
                schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        assert optimizer.state.get(mine[2]) is None  # it had no gradient
        results.append((losses, calls, [p.detach() for p in mine], repr(optimizer)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2e-5, atol=0)
    assert results[0][1] == results[1][1] == ["before", "after"] * 4
    torch.testing.assert_close(results[0][2], results[1][2], rtol=2e-5, atol=1e-6)
    assert results[0][3] == results[1][3]


def test_version_counters_are_bumped(device: str) -> None:
    (p,) = mine = parameters([(4,)], torch.float32, device)
    ours = optim.Adam(mine)
    loss = (p * p).sum()
    loss.backward(retain_graph=True)
    version = p._version
    ours.step()
    assert p._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.kernels
def test_tensor_hyperparameters(device: str) -> None:
    mine, theirs = (parameters([(4,)], torch.float64, device) for _ in range(2))
    lr = torch.tensor(0.01, dtype=torch.float64)
    betas = (torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.99, dtype=torch.float64))
    ours = optim.Adam(mine, lr=lr, betas=betas)
    stock = torch.optim.Adam(theirs, lr=0.01, betas=(0.9, 0.99))
    for step in range(3):
        set_gradients(step, mine, theirs)
        lr.fill_(0.01 * (step + 1))
        stock.param_groups[0]["lr"] = 0.01 * (step + 1)
        ours.step()
        stock.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def _sparse(p: Tensor) -> Tensor:
    return torch.sparse_coo_tensor([[0, 2]], torch.ones(2, *p.shape[1:], device=p.device), p.shape)


def test_what_the_kernels_leave_to_stock(device: str) -> None:
    for module in (optim, torch.optim):
        (p,) = parameters([(3, 4)], torch.float32, device)
        p.grad = _sparse(p)
        module.SGD([p], lr=1.0).step()
        with pytest.raises(RuntimeError, match="does not support sparse gradients"):
            module.Adam([p]).step()
        c = nn.Parameter(torch.ones(3, dtype=torch.complex64, device=device))
        c.grad = torch.ones_like(c)
        module.Adam([c]).step()
        q = torch.ones(3, device=device).requires_grad_()
        w = q.clone()
        w.grad = q * 2
        module.SGD([w], lr=0.1, differentiable=True).step()
        w.sum().backward()
        assert q.grad.tolist() == pytest.approx([0.8] * 3)
        shared = torch.ones(3, device=device)
        pair = [nn.Parameter(shared), nn.Parameter(shared)]
        set_gradients(0, pair)
        for parameter in pair:
            parameter.grad = torch.ones(3, device=device)
        module.SGD(pair, lr=0.25, **({} if module is optim else {"foreach": False})).step()
        assert shared.tolist() == [0.5] * 3
        (p,) = parameters([(3, 4)], torch.float32, device)
        p.grad = torch.ones_like(p)
        optimizer = module.Adam([p])
        optimizer.step()
        p.data = torch.ones(2, 2, device=device)
        p.grad = torch.ones(2, 2, device=device)
        with pytest.raises(RuntimeError, match="size"):
            optimizer.step()
        del optimizer.state[p]["step"]
        with pytest.raises(KeyError, match="step"):
            optimizer.step()
        overlapping = torch.zeros(5, device=device)
        pair = [nn.Parameter(overlapping[:3]), nn.Parameter(overlapping[2:])]
        for parameter in pair:
            parameter.grad = torch.ones(3, device=device)
        module.SGD(pair, lr=0.5, **({} if module is optim else {"foreach": False})).step()
        assert overlapping.tolist() == [-0.5, -0.5, -1.0, -0.5, -0.5]


def test_reasons(device: str) -> None:
    (p,) = parameters([(3,)], torch.float32, device)
    ours = optim.Adam([p])
    expected = "no gradients" if kernels.AVAILABLE else "Triton is not installed"
    assert optim.explain(ours)[0].reason == expected
    p.grad = torch.ones_like(p)
    path = optim.explain(ours)[0]
    assert (path.path, path.kernel) == (("kernel", True) if KERNELS_RUN else ("stock", False))
    assert KERNELS_RUN or path.reason == "CPU tensor"
    ours.param_groups[0]["differentiable"] = True
    assert optim.explain(ours)[0].reason == "differentiable"


@pytest.mark.kernels
@pytest.mark.parametrize(("first", "second", "shared"), [((0, 3), (2, 5), True), ((0, 3), (3, 5), False)])
def test_parameters_that_share_memory(
    first: tuple[int, int], second: tuple[int, int], shared: bool, device: str
) -> None:
    """Programs of one launch run in any order, so that values don't tell."""
    memory = torch.zeros(5, device=device)
    pair = [nn.Parameter(memory[slice(*one)]) for one in (first, second)]
    for parameter in pair:
        parameter.grad = torch.ones_like(parameter)
    explained = optim.explain(optim.SGD(pair, lr=0.5))[0]
    assert (explained.reason == "parameters share memory") == shared
    assert explained.kernel != shared


class _Annotated(Tensor):
    pass


#: Values that PyTorch takes for a number, or not, by their type, and by what it then does with them.
_ODD_NUMBERS = {
    "yes": True,
    "fraction": Fraction(1, 8),
    "NumPy's": np.float32(0.1),
    "infinite": float("inf"),
    "text": "0.1",
    "missing": None,
    "complex": 0.1j,
    "one in a row": torch.tensor([0.1]),
    "two": torch.tensor([0.1, 0.2]),
    "integer": torch.tensor(1),
    "rounded": torch.tensor(0.1, dtype=torch.bfloat16),
    "with a gradient": torch.tensor(0.1, requires_grad=True),
    "parameter": nn.Parameter(torch.tensor(0.1)),
    "subclass": torch.tensor(0.1).as_subclass(_Annotated),
    "elsewhere": torch.tensor(0.1, device="meta"),
}


def _plain_twin(name: str, params: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Ours, whose stock update is the plainest."""
    optimizer: torch.optim.Optimizer = getattr(optim, name)(params)
    if "foreach" in optimizer.defaults:
        optimizer.param_groups[0]["foreach"] = False
    return optimizer


@every_name
def test_odd_hyperparameters_are_stocks_to_judge(name: str, device: str) -> None:
    """What isn't plainly a number: the same result as stock's, or its error."""
    options = stock_of(name, parameters([(1,)], torch.float32, device)).defaults
    options.pop("initial_accumulator_value", None)  # of the constructor
    keys = [key for key, value in options.items() if isinstance(value, float | int) and not isinstance(value, bool)]
    for key, (odd, value) in product([*keys, *["betas"] * ("betas" in options)], _ODD_NUMBERS.items()):
        outcomes = []
        for make in (_plain_twin, stock_of):
            (p,) = mine = parameters([(4,)], torch.float32, device)
            p.grad = torch.ones_like(p)
            optimizer = make(name, mine)
            optimizer.param_groups[0][key] = (value, 0.9) if key == "betas" else value
            try:
                for _ in range(2):
                    optimizer.step()
                outcomes.append((None, p.detach()))
            except Exception as error:
                outcomes.append((type(error), str(error)))
            if make is _plain_twin and KERNELS_RUN and not isinstance(outcomes[-1][1], str):
                assert optim.explain(optimizer)[0].reason.startswith("a hyperparameter is"), (key, odd)
        (ours, result), (stock, expected) = outcomes
        assert ours is stock, (key, odd, outcomes)
        if stock is None:
            torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.kernels
def test_reasons_for_odd_state(device: str) -> None:
    """State that users, or other tools, put there."""
    odd = {
        "a negated view": lambda x: torch.conj(torch.complex(x, -x)).imag,
        "no kernel for torch.int64": lambda x: torch.zeros(x.shape, dtype=torch.int64, device=x.device),
        "_Annotated is not a plain tensor": lambda x: x.as_subclass(_Annotated),
    }
    for reason, make in odd.items():
        results = []
        for module in (optim, torch.optim):
            (p,) = mine = parameters([(4,)], torch.float32, device)
            p.grad = torch.ones_like(p)
            optimizer = module.SGD(mine, lr=0.5, momentum=0.5)
            optimizer.state[p]["momentum_buffer"] = make(torch.ones(4, device=device))
            if module is optim:
                assert optim.explain(optimizer)[0].reason == reason
            try:
                optimizer.step()
                results.append((None, p.detach()))
            except Exception as error:
                results.append((type(error), str(error)))
        assert results[0][0] is results[1][0]
        if results[0][0] is None:
            torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_groups_that_disagree(dtype: torch.dtype, device: str) -> None:
    """About momentum, one another's dtype, and who decays: each has its own update, and both have one norm."""
    results = []
    for module in (optim, torch.optim):
        mine = [*parameters([(5,)], torch.float32, device), *parameters([(3, 2), (4,)], dtype, device)]
        groups = [
            {"params": mine[:1], "momentum": 0.0},
            {"params": mine[1:2], "momentum": 0.9, "nesterov": True},
            {"params": mine[2:], "momentum": 0.5, "dampening": 0.3, "weight_decay": 0.1, "maximize": True},
        ]
        options = {"clip_norm": 0.5} if module is optim else {"foreach": False}
        optimizer = module.SGD(groups, lr=0.1, **options)
        for step in range(3):
            set_gradients(step, mine)
            if module is optim:
                assert all(path.kernel for path in optim.explain(optimizer))
            else:
                nn.utils.clip_grad_norm_(mine, 0.5)
            optimizer.step()
        results.append((mine, [sorted(optimizer.state.get(p, {})) for p in mine]))
    assert results[0][1] == results[1][1]
    for p, q in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5 if p.dtype == torch.float32 else 2e-2, atol=2e-3)


@pytest.mark.stock
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam", "AdamW"])
def test_stocks_fused_cpu_kernels_are_never_called(name: str) -> None:
    mine, theirs = (parameters([(40,)], torch.bfloat16, "cpu") for _ in range(2))
    ours = getattr(optim, name)(mine, fused=True)
    stock = stock_of(name, theirs)
    refuse = mock.Mock(side_effect=AssertionError)
    with mock.patch.multiple(
        torch, _fused_sgd_=refuse, _fused_adagrad_=refuse, _fused_adam_=refuse, _fused_adamw_=refuse
    ):
        for step in range(2):
            set_gradients(step, mine, theirs)
            ours.step()
            stock.step()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert ours.param_groups[0]["fused"] is True
    assert not ours._step_supports_amp_scaling


def test_compiled_training_step(device: str) -> None:
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        mine = parameters([(4,)], torch.float32, device)
        ours = optim.Adam(mine)

        def train(mine: list = mine, ours: Any = ours) -> None:
            (mine[0] ** 2).sum().backward()
            ours.step()
            ours.zero_grad()

        run: Callable[[], None] = torch.compile(train, backend="eager") if compiled else train
        for _ in range(3):
            run()
        results.append(mine[0].detach())
    torch.testing.assert_close(*results)


# --- Distributed ------------------------------------------------------------------------------------------------------


def _shares(full: Sequence[Tensor], placements: Sequence[Any], mesh: Any) -> list[nn.Parameter]:
    """Each parameter as a DTensor with the placements beside it."""
    from torch.distributed.tensor import distribute_tensor

    return [nn.Parameter(distribute_tensor(p.detach(), mesh, place)) for p, place in zip(full, placements, strict=True)]


def _share_gradients(mine: Sequence[Tensor], full: Sequence[Tensor], placements: Sequence[Any]) -> None:
    from torch.distributed.tensor import distribute_tensor

    for p, q, place in zip(mine, full, placements, strict=True):
        p.grad = distribute_tensor(q.grad, p.device_mesh, place)


def _train_sharded(rank: int, path: str, processes: int = 2) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=processes)
    try:
        mesh = init_device_mesh("cpu", (processes,))
        full = parameters([(6, 4), (5,)], torch.float32, "cpu")
        placements = [[Shard(0)], [Replicate()]]
        mine = _shares(full, placements, mesh)
        ours = optim.AdamW(mine, lr=0.1, clip_norm=0.5, averaging=0.9)
        stock = torch.optim.AdamW(full, lr=0.1)
        for step in range(2):
            set_gradients(step, full)
            _share_gradients(mine, full, placements)
            versions = [p._version for p in mine]
            assert optim.explain(ours)[0].kernel is KERNELS_RUN, optim.explain(ours)
            ours.step()
            assert all(p._version > version for p, version in zip(mine, versions, strict=True))
            nn.utils.clip_grad_norm_(full, 0.5)
            stock.step()
        for p, q in zip(mine, full, strict=True):
            torch.testing.assert_close(p.full_tensor(), q, rtol=2e-5, atol=1e-6)
        _train_with_shards_of_all_kinds(mesh)
        if KERNELS_RUN:
            _refuse_what_is_distributed_otherwise(mesh)
        _train_fully_sharded(mesh)
    finally:
        dist.destroy_process_group()


def _train_with_shards_of_all_kinds(mesh: Any) -> None:
    """A process without a row, and a matrix whose rows are divided between processes: one norm for all of them."""
    from torch.distributed.tensor import Shard

    full = parameters([(1, 4), (5, 2), (4, 6)], torch.float32, "cpu")
    placements = [[Shard(0)], [Shard(0)], [Shard(1)]]
    mine = _shares(full, placements, mesh)
    groups = [{"params": mine[:2]}, {"params": mine[2:]}]
    ours = optim.SGD(groups, lr=0.1, clip_norm=0.5, group_lasso=0.7)
    stock = torch.optim.SGD(full, lr=0.1)
    for step in range(2):
        set_gradients(step, full)
        _share_gradients(mine, full, placements)
        if KERNELS_RUN:
            assert [path.kernel for path in optim.explain(ours)] == [True, False]
            assert optim.explain(ours)[1].reason == "a group of the group lasso is spread over processes"
        ours.step()
        nn.utils.clip_grad_norm_(full, 0.5)
        stock.step()
        with torch.no_grad():
            for q in full:
                q.copy_(proximal(q, 0.1, 0.0, 0.0, 0.7))
    for p, q in zip(mine, full, strict=True):
        torch.testing.assert_close(p.full_tensor(), q, rtol=2e-5, atol=1e-6)


_OTHERWISE = "gradient or state is distributed otherwise than its parameter"


def _refuse_what_is_distributed_otherwise(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    (mine,) = _shares([torch.ones(4, 6)], [[Shard(0)]], mesh)
    ours = optim.SGD([mine])
    for gradient, reason in (
        (distribute_tensor(torch.ones(4, 6), mesh, [Replicate()]), _OTHERWISE),
        (DTensor.from_local(torch.ones(4, 6), mesh, [Partial()]), "a distributed tensor is a partial sum"),
    ):
        mine.grad = gradient
        assert optim.explain(ours)[0].reason == reason


def _train_fully_sharded(mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    models = [nn.Linear(4, 6) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    fully_shard(models[0], mesh=mesh)
    optimizers = [optim.Adam(models[0].parameters(), lr=0.1), torch.optim.Adam(models[1].parameters(), lr=0.1)]
    x = torch.randn(3, 4)
    for _ in range(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-4, atol=1e-5)


on_the_cpu = pytest.mark.skipif(ON_GPU or not torch.distributed.is_available(), reason="processes on CPUs")


@on_the_cpu
def test_shards_in_one_process(tmp_path: Any) -> None:
    _train_sharded(0, str(tmp_path / "rendezvous"), processes=1)


@pytest.mark.thorough
@on_the_cpu
def test_two_processes(tmp_path: Any) -> None:
    torch.multiprocessing.spawn(_train_sharded, (str(tmp_path / "rendezvous"),), nprocs=2)


# --- On a GPU ---------------------------------------------------------------------------------------------------------


@every_name
@pytest.mark.gpu
def test_no_synchronisation_and_no_recompilation(name: str, device: str) -> None:
    mine = parameters([(300,), (4, 5)], torch.float32, device)
    ours = getattr(optim, name)(mine, clip_norm=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(ours, 0.9)
    for step in range(2):
        set_gradients(step, mine)
        ours.step()
        schedule.step()
    compiled = compiled_kernels("optimizer")
    with no_synchronisation():
        for _ in range(50):
            for p in mine:
                p.grad = p.grad * 0.9
            ours.step()
            schedule.step()
    assert compiled_kernels("optimizer") == compiled


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["Adam", "NAdam", "RMSprop"])
def test_capture(name: str, device: str) -> None:
    lr = torch.tensor(0.1, device=device)
    mine, theirs = (parameters([(300,), (4, 5)], torch.float32, device) for _ in range(2))
    ours = getattr(optim, name)(mine, lr=lr, capturable=True)
    stock = getattr(torch.optim, name)(theirs, lr=lr, capturable=True, foreach=False)
    set_gradients(0, mine, theirs)
    graph, _ = capture(ours.step)
    for step in range(3):
        lr.fill_(0.1 / (step + 1))
        graph.replay()
    for step in range(6):
        lr.fill_(0.1 / max(1, step - 2))
        stock.step()
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
