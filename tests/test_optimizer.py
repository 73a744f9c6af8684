"""The optimizers against ``torch.optim``'s: PyTorch's own OptimizerInfo samples, and what a training loop does."""

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from support.device import KERNELS_RUN, ON_GPU
from support.layouts import LAYOUTS
from support.pytorch_samples import OPTIMIZERS
from torch import Tensor, nn
from torch.testing._internal.common_optimizers import OptimizerErrorEnum

import fusednn
from fusednn import kernels, optim
from fusednn.kernels.optimizer import ALGORITHMS

NAMES = ["SGD", "Adagrad", "Adadelta", "RMSprop", "Adam", "AdamW", "Adamax", "NAdam", "RAdam"]

every_info = pytest.mark.parametrize("info", OPTIMIZERS, ids=lambda info: info.name)
every_name = pytest.mark.parametrize("name", NAMES)
interpreted = pytest.mark.skipif(not kernels.INTERPRETING, reason="the traffic meter counts in the interpreter")

#: One call of each algorithm of the kernels' table.
CALLS: list[tuple[str, str, dict[str, Any]]] = [
    ("sgd", "SGD", {"lr": 0.1}),
    ("sgd_momentum", "SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    ("sgd_nesterov", "SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("adagrad", "Adagrad", {"lr_decay": 0.1}),
    ("adadelta", "Adadelta", {"weight_decay": 0.1}),
    ("rmsprop", "RMSprop", {}),
    ("rmsprop_momentum", "RMSprop", {"momentum": 0.9}),
    ("rmsprop_nesterov", "RMSprop", {"momentum": 0.9, "nesterov": True}),
    ("rmsprop_centered", "RMSprop", {"centered": True}),
    ("rmsprop_centered_momentum", "RMSprop", {"centered": True, "momentum": 0.9}),
    ("rmsprop_centered_nesterov", "RMSprop", {"centered": True, "momentum": 0.9, "nesterov": True}),
    ("adam", "Adam", {"weight_decay": 0.1}),
    ("adam_amsgrad", "AdamW", {"amsgrad": True}),
    ("adamax", "Adamax", {}),
    ("nadam", "NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("radam", "RAdam", {"weight_decay": 0.1}),
]
STOCK_CALLS = [call for call in CALLS if not (call[1] == "RMSprop" and "nesterov" in call[2])]

SHAPES = [(3, 4), (2,), (), (0, 3)]


def parameters(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: str, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)) for shape in shapes
    ]


def twins_of(tensors: Sequence[Tensor]) -> list[nn.Parameter]:
    """The same parameters again, strides included."""
    return [
        nn.Parameter(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)) for t in tensors
    ]


def set_gradients(step: int, *models: Sequence[Tensor], scale: float = 1.0) -> None:
    """The same new gradients for each."""
    generator = torch.Generator().manual_seed(100 + step)
    for group in zip(*models, strict=True):
        gradient = torch.randn(group[0].shape, generator=generator, dtype=torch.float64) * scale
        for parameter in group:
            parameter.grad = gradient.to(parameter.device, parameter.dtype)


def assert_like_stock(ours: torch.optim.Optimizer, stock: torch.optim.Optimizer, **tolerance: float) -> None:
    """Parameters and state, its keys included, are stock's."""
    for mine, theirs in zip(ours.param_groups, stock.param_groups, strict=True):
        for p, q in zip(mine["params"], theirs["params"], strict=True):
            torch.testing.assert_close(p, q, **tolerance)
            assert (p in ours.state) == (q in stock.state)
            assert list(ours.state.get(p, {})) == list(stock.state.get(q, {}))
            for key, value in stock.state.get(q, {}).items():
                torch.testing.assert_close(ours.state[p][key], value, msg=lambda m, key=key: f"{key}: {m}", **tolerance)


# Relative to stock's single-tensor update; where numbers cancel, to what they were computed from.
TOLERANCE = {torch.float32: {"rtol": 2e-5, "atol": 2e-6}, torch.float64: {"rtol": 1e-9, "atol": 1e-12}}


# --- PyTorch's samples ------------------------------------------------------------------------------------------------


def test_all_nine_are_there() -> None:
    assert {info.name for info in OPTIMIZERS} == set(NAMES)
    assert {algorithm for algorithm, _, _ in CALLS} == set(ALGORITHMS)


@every_info
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.smoke
def test_optimizer_info_samples(info: Any, dtype: torch.dtype, device: str) -> None:
    for sample in info.optim_inputs_func(device=device, dtype=dtype):
        mine, theirs = (parameters([(3, 4), (2,)], dtype, device) for _ in range(2))
        ours = getattr(optim, info.name)(mine, **copy.deepcopy(sample.kwargs))
        stock = info.optim_cls(theirs, foreach=False, **copy.deepcopy(sample.kwargs))
        for step in range(3):
            set_gradients(step, mine, theirs)
            assert [path.kernel for path in optim.explain(ours)] == [KERNELS_RUN]
            ours.step()
            stock.step()
            assert_like_stock(ours, stock, **TOLERANCE[dtype])
        assert ours.param_groups[0].keys() == stock.param_groups[0].keys()
        assert ours.defaults.keys() == stock.defaults.keys()


@every_info
def test_optimizer_info_errors(info: Any, device: str) -> None:
    for error in info.optim_error_inputs_func(device=device, dtype=torch.float32):
        given = error.optimizer_error_input
        params = [nn.Parameter(torch.randn(2, 3))] if given.params is None else given.params
        assert error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(error.error_type, match=error.error_regex):
                getattr(optim, info.name)(params, **given.kwargs)


@every_name
def test_constructor_is_stocks_with_our_keywords(name: str) -> None:
    for ours, stock in (
        (getattr(optim, name), getattr(torch.optim, name)),
        (getattr(optim, name).__init__, getattr(torch.optim, name).__init__),
    ):
        mine, theirs = (list(inspect.signature(cls).parameters.values()) for cls in (ours, stock))
        assert mine[: len(theirs)] == theirs
        assert {p.name for p in mine[len(theirs) :]} >= {"clip_norm", "averaging", "master_weights"}
        assert all(p.kind is p.KEYWORD_ONLY for p in mine[len(theirs) :])
    assert issubclass(getattr(optim, name), getattr(torch.optim, name))


# --- Accuracy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "name", "arguments"), STOCK_CALLS, ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.kernels
def test_sixteen_bits(algorithm: str, name: str, arguments: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    """Within one unit in the last place of stock's result, or of the exact one from the same state."""
    mine = parameters([(40, 5)], dtype, device)
    ours = getattr(optim, name)(mine, **arguments)
    for step in range(3):
        set_gradients(step, mine)
        theirs, exact = twins_of(mine), [nn.Parameter(p.detach().double()) for p in mine]
        theirs[0].grad, exact[0].grad = mine[0].grad.clone(), mine[0].grad.double()
        stock = getattr(torch.optim, name)(theirs, foreach=False, **arguments)
        reference = getattr(torch.optim, name)(exact, foreach=False, **arguments)
        if step:
            stock.load_state_dict(copy.deepcopy(ours.state_dict()))
            reference.load_state_dict(copy.deepcopy(ours.state_dict()))
        for optimizer in (ours, stock, reference):
            optimizer.step()
        pairs = [(mine[0], theirs[0], exact[0])]
        keys = ALGORITHMS[algorithm].states
        pairs += [(ours.state[mine[0]][k], stock.state[theirs[0]][k], reference.state[exact[0]][k]) for k in keys]
        for value, from_stock, true in pairs:
            info = torch.finfo(dtype)
            unit = torch.maximum(value.double().abs(), true.detach().abs()).clamp_min(info.smallest_normal) * info.eps
            off = torch.minimum((value.double() - from_stock.double()).abs(), (value.double() - true).abs())
            assert (off <= unit).all(), f"{float((off / unit).max()):.3g} units"


@pytest.mark.parametrize(
    ("algorithm", "name", "arguments"), STOCK_CALLS, ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.thorough
@pytest.mark.kernels
def test_no_drift_in_a_hundred_steps(algorithm: str, name: str, arguments: dict[str, Any], device: str) -> None:
    """No farther from stock's single-tensor update than stock's foreach, and a few roundings, are."""
    mine, single, several = (parameters([(64,)], torch.float32, device) for _ in range(3))
    ours = getattr(optim, name)(mine, **arguments)
    stock = getattr(torch.optim, name)(single, foreach=False, **arguments)
    foreach = getattr(torch.optim, name)(several, foreach=True, **arguments)
    for step in range(100):
        set_gradients(step, mine, single, several)
        for optimizer in (ours, stock, foreach):
            optimizer.step()
    allowed = (several[0] - single[0]).abs().max() + 100 * torch.finfo(torch.float32).eps * single[0].abs().max()
    assert (mine[0] - single[0]).abs().max() <= allowed


@pytest.mark.kernels
def test_extreme_gradients(device: str) -> None:
    values = torch.tensor(
        [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, 1e-20, -1e15, 1e19], device=device
    )
    for _, name, arguments in STOCK_CALLS:
        mine, theirs = ([nn.Parameter(torch.ones_like(values))] for _ in range(2))
        ours = getattr(optim, name)(mine, **arguments)
        stock = getattr(torch.optim, name)(theirs, foreach=False, **arguments)
        for _ in range(2):
            mine[0].grad, theirs[0].grad = values.clone(), values.clone()
            ours.step()
            stock.step()
        torch.testing.assert_close(mine[0], theirs[0], equal_nan=True, rtol=2e-5, atol=1e-6)


# --- Layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", LAYOUTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "offset"])
@pytest.mark.kernels
def test_layouts(layout: str, gradient: str, device: str) -> None:
    x = torch.randn(2, 3, 5, 4, device=device)
    g = torch.randn(2, 3, 5, 4, device=device)
    mine, theirs = ([nn.Parameter(LAYOUTS[layout](x))] for _ in range(2))
    ours, stock = optim.Adam(mine), torch.optim.Adam(theirs, foreach=False)
    for _ in range(2):
        mine[0].grad, theirs[0].grad = LAYOUTS[gradient](g), LAYOUTS[gradient](g)
        before = mine[0].grad.clone()
        assert optim.explain(ours)[0].kernel
        ours.step()
        stock.step()
        torch.testing.assert_close(mine[0].grad, before, rtol=0, atol=0)
    assert_like_stock(ours, stock, **TOLERANCE[torch.float32])
    assert mine[0].stride() == theirs[0].stride()


@pytest.mark.kernels
def test_state_laid_out_otherwise(device: str) -> None:
    x = torch.randn(2, 3, 5, 4, device=device)
    mine, theirs = ([nn.Parameter(x.clone())] for _ in range(2))
    ours, stock = optim.Adam(mine), torch.optim.Adam(theirs, foreach=False)
    for step in range(3):
        set_gradients(step, mine, theirs)
        ours.step()
        stock.step()
        if step == 0:
            for optimizer, (parameter,) in ((ours, mine), (stock, theirs)):
                state = optimizer.state[parameter]
                state["exp_avg"] = state["exp_avg"].contiguous(memory_format=torch.channels_last)
    assert_like_stock(ours, stock, **TOLERANCE[torch.float32])


@pytest.mark.kernels
def test_swapped_memory_and_mixed_dtypes(device: str) -> None:
    shapes = [((5,), torch.float32), ((6,), torch.bfloat16), ((7,), torch.float64), ((8,), torch.float32)]
    mine = [nn.Parameter(torch.ones(shape, dtype=dtype, device=device)) for shape, dtype in shapes]
    theirs = twins_of(mine)
    ours, stock = optim.SGD(mine, momentum=0.9, lr=0.5), torch.optim.SGD(theirs, momentum=0.9, lr=0.5, foreach=False)
    for step in range(4):
        set_gradients(step, mine, theirs)
        ours.step()
        stock.step()
        if step == 1:
            for parameter in (mine[0], theirs[0]):
                parameter.data = torch.full((5,), 3.0, device=device)
        if step == 2:
            for optimizer, parameter in ((ours, mine[3]), (stock, theirs[3])):
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros(8, device=device)
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2 if p.dtype == torch.bfloat16 else 2e-5, atol=1e-6)


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("SGD", {"momentum": 0.9}), ("SGD", {"momentum": 0.9, "weight_decay": 0.1}), ("RMSprop", {}), ("Adam", {})],
    ids=["momentum", "decay", "RMSprop", "Adam"],
)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_gradients_of_another_dtype(
    name: str, arguments: dict[str, Any], dtypes: tuple[torch.dtype, torch.dtype], device: str
) -> None:
    """As stock takes them, with state of the same dtype, or refuses them."""
    (mine,), (theirs,) = (parameters([(30,)], dtypes[0], device) for _ in range(2))
    if not hasattr(mine, "grad_dtype"):
        pytest.skip("this version of PyTorch has gradients of the parameter's dtype only")
    ours, stock = (getattr(module, name)([p], **arguments) for module, p in ((optim, mine), (torch.optim, theirs)))
    for p in (mine, theirs):
        p.grad_dtype = dtypes[1]
    for _ in range(2):
        mine.grad = theirs.grad = torch.randn(30, device=device).to(dtypes[1])
        if name == "Adam":
            for optimizer in (ours, stock):
                with pytest.raises(RuntimeError, match="expected dtype"):
                    optimizer.step()
            return
        assert optim.explain(ours)[0].kernel
        ours.step()
        stock.step()
    assert_like_stock(ours, stock, rtol=1e-2, atol=1e-2)


# --- In a training loop -----------------------------------------------------------------------------------------------


@every_name
@pytest.mark.parametrize("first", ["ours", "stock"])
def test_state_dict_both_ways(name: str, first: str, device: str) -> None:
    mine, theirs = (parameters(SHAPES, torch.float32, device) for _ in range(2))
    ours = getattr(optim, name)(mine)
    stock = getattr(torch.optim, name)(theirs, foreach=False)
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


@pytest.mark.stock
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam", "AdamW"])
def test_stocks_fused_cpu_kernels_are_never_called(name: str) -> None:
    mine, theirs = (parameters([(40,)], torch.bfloat16, "cpu") for _ in range(2))
    ours = getattr(optim, name)(mine, fused=True)
    stock = getattr(torch.optim, name)(theirs, foreach=False)
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


@pytest.mark.parametrize("name", ["SGD", "Adam", "NAdam", "Adagrad"])
def test_grad_scaler(name: str, device: str) -> None:
    arguments = {"lr": 0.1, **({"momentum": 0.9} if name == "SGD" else {})}
    mine, theirs = (parameters([(4,), (3,)], torch.float32, device) for _ in range(2))
    ours = getattr(optim, name)(mine, **arguments)
    stock = getattr(torch.optim, name)(theirs, foreach=False, **arguments)
    scalers = [torch.amp.GradScaler(device, init_scale=8.0, growth_interval=2) for _ in range(2)]
    for step in range(5):
        for scaler, optimizer, params in zip(scalers, (ours, stock), (mine, theirs), strict=True):
            optimizer.zero_grad()
            loss = sum((p**3).sum() for p in params) * (float("inf") if step in (0, 2) else 1.0)
            scaler.scale(loss).backward()
            assert optimizer is stock or optimizer._step_supports_amp_scaling or not KERNELS_RUN
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        for p, q in zip(mine, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=2e-5, atol=1e-6)
    for p, q in zip(mine, theirs, strict=True):
        if "step" in stock.state[q]:
            assert ours.state[p]["step"].item() == stock.state[q]["step"].item() == 3


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


# --- Options of ours --------------------------------------------------------------------------------------------------


def in_both_paths(run: Callable[[], None]) -> None:
    """Once as it comes, and once where every group goes to stock."""
    run()
    if KERNELS_RUN:
        with mock.patch.object(optim.FusedOptimizer, "_refusal", return_value="told so"):
            run()


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


def proximal(weight: Tensor, lr: float, l1: float, l2: float, group_lasso: float) -> Tensor:
    """The proximal operators, as the literature writes them."""
    weight = torch.sign(weight) * torch.relu(weight.abs() - lr * l1) / (1 + lr * l2)
    if group_lasso and weight.dim() > 1:
        rows = weight.reshape(weight.shape[0], -1)
        bound = lr * group_lasso * rows.shape[1] ** 0.5
        weight = (rows * torch.relu(1 - bound / rows.norm(dim=1, keepdim=True))).reshape(weight.shape)
    return weight


@pytest.mark.parametrize(
    "strengths",
    [(0.5, 0.0, 0.0), (0.5, 0.7, 0.0), (0.0, 0.0, 1.5), (0.2, 0.3, 1.0)],
    ids=["l1", "elastic", "group", "all"],
)
def test_penalties(strengths: tuple[float, float, float], device: str) -> None:
    def run() -> None:
        mine, theirs = (parameters([(6, 9), (5,), (3, 2, 4, 5)], torch.float32, device) for _ in range(2))
        for params in (mine, theirs):
            params[2].data = params[2].data.contiguous(memory_format=torch.channels_last)
            params.append(nn.Parameter(params[0].detach().clone().t()))  # rows that aren't runs of memory
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


@pytest.mark.parametrize(
    "options",
    [{"clip_norm": 0.0}, {"clip_value": -1.0}, {"l1": -1.0}, {"averaging": 1.0}, {"averaging": "median"}],
    ids=str,
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Invalid"):
        optim.Adam([nn.Parameter(torch.ones(3))], **options)


def test_options_survive_a_stock_state_dict(device: str) -> None:
    mine, theirs = (parameters([(3,)], torch.float32, device) for _ in range(2))
    ours, stock = optim.Adam(mine, clip_norm=1.0), torch.optim.Adam(theirs)
    set_gradients(0, theirs)
    stock.step()
    ours.load_state_dict(stock.state_dict())
    assert ours.param_groups[0]["clip_norm"] == 1.0


# --- Replacement ------------------------------------------------------------------------------------------------------


@every_name
def test_replace(name: str, device: str) -> None:
    mine, theirs = (parameters(SHAPES, torch.float32, device) for _ in range(2))
    ours = getattr(torch.optim, name)(mine)
    stock = getattr(torch.optim, name)(theirs, foreach=False)
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
    weights = [nn.Parameter(torch.ones(3))]
    with pytest.raises(TypeError, match="LBFGS has no fusednn twin"):
        optim.replace(torch.optim.LBFGS(weights))
    with pytest.raises(TypeError, match="no option nesterov"):
        optim.replace(torch.optim.Adam(weights), nesterov=True)
    stepped = torch.optim.SGD(weights)
    stepped.step = lambda: None
    with pytest.raises(ValueError, match="overridden"):
        optim.replace(stepped)
    assert optim.replace(torch.optim.Adam(weights), clip_norm=1.0).param_groups[0]["clip_norm"] == 1.0


# --- Launches, uploads and bytes --------------------------------------------------------------------------------------


@pytest.mark.kernels
@interpreted
def test_three_hundred_tensors_take_one_launch(device: str) -> None:
    from fusednn.kernels.instruments.traffic import measure_traffic

    mine = parameters([(3,)] * 297 + [(2,)] * 3, torch.float32, device)
    mine[-1] = nn.Parameter(mine[-1].detach().bfloat16())
    ours = optim.SGD(mine, lr=0.1)
    set_gradients(0, mine)
    with mock.patch.object(kernels.optimizer, "launch"):  # which would take a while
        ours.step()
    with measure_traffic() as traffic:
        ours.step()
    assert [launch.kernel for launch in traffic.kernel_launches] == ["update_kernel"] * 2  # float32, bfloat16
    assert [launch.programs for launch in traffic.kernel_launches] == [299, 1]
    # Everything else of a plain step is the profiler's.
    assert not [operation for operation in traffic.operations if not operation.name.startswith("profiler")]


@pytest.mark.kernels
@interpreted
def test_rows_are_uploaded_when_they_change(device: str) -> None:
    from fusednn.kernels.multi_tensor import Table

    mine = parameters([(3,), (4,)], torch.float32, device)
    ours = optim.Adam(mine, clip_norm=1.0)
    set_gradients(0, mine)
    sent = []
    original = Table._send

    def send(table: Table, words: Any, target: Tensor) -> None:
        sent.append(words.size)
        original(table, words, target)

    with mock.patch.object(Table, "_send", send):
        ours.step()
        assert len(sent) == 1
        ours.param_groups[0]["lr"] = 0.5
        ours.step()
        assert len(sent) == 1
        kept = [p.grad for p in mine]
        set_gradients(1, mine)  # new memory
        ours.step()
        assert sent[1:] == [2]
        mine[0].data = mine[0].detach().clone()
        ours.step()
        assert sent[2:] == [2]
    assert kept


@pytest.mark.kernels
@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("algorithm", "name", "arguments"), CALLS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_bytes(algorithm: str, name: str, arguments: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    from fusednn.kernels.instruments.traffic import measure_traffic

    mine = parameters([(16, 1024)], dtype, device)
    ours = getattr(optim, name)(mine, **arguments)
    set_gradients(0, mine)
    ours.step()
    with measure_traffic() as traffic:
        ours.step()
    budget = ALGORITHMS[algorithm].budget(mine[0].numel(), dtype)
    assert budget <= traffic.bytes <= 1.05 * budget
    assert traffic.launches == 1


def test_budgets_are_those_of_the_design() -> None:
    per_parameter = {name: row.budget(1, torch.float32) for name, row in ALGORITHMS.items()}
    assert {per_parameter[name] for name in ("adam", "nadam", "radam", "adamax", "adadelta")} == {28}
    assert {per_parameter[name] for name in ("rmsprop", "adagrad", "sgd_momentum")} == {20}


@pytest.mark.kernels
@interpreted
def test_the_norm_is_one_more_launch(device: str) -> None:
    from fusednn.kernels.instruments.traffic import measure_traffic

    mine = parameters([(5000,), (3,)], torch.float32, device)
    ours = optim.SGD(mine, lr=0.1, clip_norm=1.0)
    set_gradients(0, mine)
    with measure_traffic() as traffic:
        ours.step()
    assert [launch.kernel for launch in traffic.kernel_launches] == ["squares_kernel", "update_kernel"]
    assert traffic.kernel_launches[0].loaded_bytes <= 1.05 * 4 * 5003


@pytest.mark.kernels
def test_two_runs_agree_bit_for_bit(device: str) -> None:
    results = []
    for _ in range(2):
        mine = parameters([(5000,), (7, 3)], torch.float32, device)
        ours = optim.Adam(mine, clip_norm=1.0, group_lasso=0.1)
        set_gradients(0, mine)
        ours.step()
        results.append([p.detach() for p in mine])
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


@pytest.mark.kernels
def test_every_launch_is_a_shipped_configuration(device: str) -> None:
    launched = []
    original = kernels.optimizer.launch
    shipped = set(kernels.shipped("optimizer"))
    with mock.patch.object(kernels.optimizer, "launch", lambda c, *rest: launched.append(c) or original(c, *rest)):
        for _, name, arguments in CALLS:
            mine = parameters([(3,)], torch.float32, device)
            ours = getattr(optim, name)(mine, **arguments)
            set_gradients(0, mine)
            ours.step()
    assert len(set(launched)) == len(ALGORITHMS)
    assert set(launched) <= shipped


# --- Distributed ------------------------------------------------------------------------------------------------------


def _train_sharded(rank: int, path: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        full = parameters([(6, 4), (5,)], torch.float32, "cpu")
        placements = [[Shard(0)], [Replicate()]]
        mine = [
            nn.Parameter(distribute_tensor(p.detach(), mesh, place)) for p, place in zip(full, placements, strict=True)
        ]
        ours = optim.AdamW(mine, lr=0.1, clip_norm=0.5, averaging=0.9)
        stock = torch.optim.AdamW(full, lr=0.1)
        for step in range(2):
            set_gradients(step, full)
            for p, q, place in zip(mine, full, placements, strict=True):
                p.grad = distribute_tensor(q.grad, mesh, place)
            versions = [p._version for p in mine]
            assert optim.explain(ours)[0].kernel is KERNELS_RUN, optim.explain(ours)
            ours.step()
            assert all(p._version > version for p, version in zip(mine, versions, strict=True))
            nn.utils.clip_grad_norm_(full, 0.5)
            stock.step()
        for p, q in zip(mine, full, strict=True):
            torch.testing.assert_close(p.full_tensor(), q, rtol=2e-5, atol=1e-6)
        _train_with_shards_of_all_kinds(mesh)
        _train_fully_sharded(mesh)
    finally:
        dist.destroy_process_group()


def _train_with_shards_of_all_kinds(mesh: Any) -> None:
    """A process without a row, and a matrix whose rows are divided between processes: one norm for all of them."""
    from torch.distributed.tensor import Shard, distribute_tensor

    full = parameters([(1, 4), (5, 2), (4, 6)], torch.float32, "cpu")
    placements = [[Shard(0)], [Shard(0)], [Shard(1)]]
    mine = [nn.Parameter(distribute_tensor(p.detach(), mesh, place)) for p, place in zip(full, placements, strict=True)]
    groups = [{"params": mine[:2]}, {"params": mine[2:]}]
    ours = optim.SGD(groups, lr=0.1, clip_norm=0.5, group_lasso=0.7)
    stock = torch.optim.SGD(full, lr=0.1)
    for step in range(2):
        set_gradients(step, full)
        for p, q, place in zip(mine, full, placements, strict=True):
            p.grad = distribute_tensor(q.grad, mesh, place)
        if KERNELS_RUN:
            assert [path.kernel for path in optim.explain(ours)] == [True, False]
            assert "spread over processes" in optim.explain(ours)[1].reason
        ours.step()
        nn.utils.clip_grad_norm_(full, 0.5)
        stock.step()
        with torch.no_grad():
            for q in full:
                q.copy_(proximal(q, 0.1, 0.0, 0.0, 0.7))
    for p, q in zip(mine, full, strict=True):
        torch.testing.assert_close(p.full_tensor(), q, rtol=2e-5, atol=1e-6)


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


@pytest.mark.thorough
@pytest.mark.skipif(ON_GPU or not torch.distributed.is_available(), reason="two processes on CPUs")
def test_two_processes(tmp_path: Any) -> None:
    torch.multiprocessing.spawn(_train_sharded, (str(tmp_path / "rendezvous"),), nprocs=2)


# --- On a GPU ---------------------------------------------------------------------------------------------------------


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Any call that waits for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def compiled_kernels() -> int:
    """How many updates Triton has compiled for this process."""
    return sum(len(cache[0]) for cache in kernels.optimizer.update_kernel.device_caches.values())


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
    compiled = compiled_kernels()
    with no_synchronisation():
        for _ in range(50):
            for p in mine:
                p.grad = p.grad * 0.9
            ours.step()
            schedule.step()
    assert compiled_kernels() == compiled


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["SGD", "AdamW", "NAdam"])
def test_a_grad_scaler_waits_for_nothing(name: str, device: str) -> None:
    mine = parameters([(300,), (4, 5)], torch.float32, device)
    ours = getattr(optim, name)(mine, clip_norm=1.0)
    scaler = torch.amp.GradScaler(device, init_scale=8.0)

    def train() -> None:
        scaler.scale(sum((p**2).sum() for p in mine)).backward()
        scaler.step(ours)
        scaler.update()
        ours.zero_grad()

    for _ in range(2):
        train()
    compiled = compiled_kernels()
    with no_synchronisation():
        for _ in range(50):
            train()
    assert compiled_kernels() == compiled


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["Adam", "NAdam", "RMSprop"])
def test_capture(name: str, device: str) -> None:
    lr = torch.tensor(0.1, device=device)
    mine, theirs = (parameters([(300,), (4, 5)], torch.float32, device) for _ in range(2))
    ours = getattr(optim, name)(mine, lr=lr, capturable=True)
    stock = getattr(torch.optim, name)(theirs, lr=lr, capturable=True, foreach=False)
    set_gradients(0, mine, theirs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            ours.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    for step in range(3):
        lr.fill_(0.1 / (step + 1))
        graph.replay()
    for step in range(6):
        lr.fill_(0.1 / max(1, step - 2))
        stock.step()
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_face() -> None:
    assert fusednn.optim.Adam is optim.Adam
