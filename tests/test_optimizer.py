"""The optimizers against ``torch.optim``'s: PyTorch's own OptimizerInfo samples, accuracy, launches and bytes."""

import copy
import inspect
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from support.device import KERNELS_RUN
from support.optimizers import (
    CALLS,
    NAMES,
    STOCK_CALLS,
    TOLERANCE,
    assert_like_stock,
    every_info,
    every_name,
    in_both_paths,
    interpreted,
    parameters,
    set_gradients,
    stock_of,
    twins_of,
)
from support.pytorch_samples import OPTIMIZERS
from torch import Tensor, nn
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    _get_optim_inputs_including_global_cliquey_kwargs,
)

import fusednn
from fusednn import kernels, optim
from fusednn.kernels.functions.optimizer import ALGORITHMS
from fusednn.optim.twin import TWINS, stock_class
from fusednn.testing import LAYOUTS

# --- PyTorch's samples ------------------------------------------------------------------------------------------------


def test_face() -> None:
    assert fusednn.optim.Adam is optim.Adam


def test_all_are_there() -> None:
    assert {info.name for info in OPTIMIZERS} == set(NAMES) - {"Lion"}  # which PyTorch hasn't
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
@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.filterwarnings("ignore")  # of what is deprecated, and of capturable steps that aren't captured
def test_optimizer_info_samples_with_every_implementation(info: Any, dtype: torch.dtype, device: str) -> None:
    """Each sample with ``foreach``, ``fused``, ``differentiable`` and ``capturable``, in one group and in two."""
    for sample in _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, info):
        for several in (False, True):
            outcomes = []
            for cls in (getattr(optim, info.name), info.optim_cls):
                weights = [
                    nn.Parameter(p.detach().to(dtype)) for p in parameters([(3, 4), (2,)], torch.float64, device)
                ]
                groups = [{"params": [p], "lr": 0.1 / (i + 1)} for i, p in enumerate(weights)]
                optimizer = cls(groups if several else weights, **copy.deepcopy(sample.kwargs))
                try:
                    for step in range(3):
                        for i, p in enumerate(weights):
                            p.grad = torch.linspace(step - 1.3, i + 2.1, p.numel(), device=device).view_as(p).to(dtype)
                        optimizer.step()
                    outcomes.append(optimizer)
                except Exception as error:
                    outcomes.append(type(error))
            if isinstance(outcomes[1], torch.optim.Optimizer):
                assert_like_stock(*outcomes, **TOLERANCE[dtype.to_real()])
            else:
                assert outcomes[0] is outcomes[1], sample.desc


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
    twin = getattr(optim, name)
    base = stock_class(twin)
    for ours, stock in ((twin, base), (twin.__init__, base.__init__)):
        mine, theirs = (list(inspect.signature(cls).parameters.values()) for cls in (ours, stock))
        assert mine[: len(theirs)] == theirs
        assert {p.name for p in mine[len(theirs) :]} >= {"clip_norm", "averaging", "master_weights"}
        assert all(p.kind is p.KEYWORD_ONLY for p in mine[len(theirs) :])
    assert issubclass(twin, base)


_STATELESS = " has no _init_group, which makes the state"


class Listless(torch.optim.SGD):
    def _init_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None: ...  # type: ignore[override]


@pytest.mark.whole
@pytest.mark.parametrize(
    ("bases", "body", "why"),
    [
        (
            (optim.FusedOptimizer, torch.optim.Optimizer),
            {"_recipe": None},
            "Optimizer" + _STATELESS,
        ),
        (
            (optim.FusedOptimizer, torch.optim.LBFGS),
            {"_recipe": None},
            "LBFGS" + _STATELESS,
        ),
        ((optim.FusedOptimizer,), {"_recipe": None}, "Optimizer" + _STATELESS),
        (
            (optim.FusedOptimizer, Listless),
            {"_recipe": None},
            "Listless._init_group doesn't take lists of parameters and gradients to fill",
        ),
        ((optim.FusedOptimizer, torch.optim.Adam), {"_recipe": None}, "algorithms.Adam is; derive from that"),
        ((optim.FusedOptimizer, torch.optim.ASGD), {}, "it has no _recipe"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_a_twin_is_refused(bases: Any, body: dict[str, Any], why: str) -> None:
    before = dict(TWINS)
    with pytest.raises(TypeError, match=f"Mine can't be the twin of .*: .*{why}"):
        type("Mine", bases, body)
    assert before == TWINS


def test_users_derive_from_twins() -> None:
    mine = type("Mine", (optim.SGD,), {})([nn.Parameter(torch.ones(2))], lr=0.1, l1=0.5)
    assert stock_class(type(mine)) is torch.optim.SGD
    assert mine.param_groups[0]["l1"] == 0.5


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
        stock = stock_of(name, theirs, **arguments)
        reference = stock_of(name, exact, **arguments)
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
    stock = stock_of(name, single, **arguments)
    foreach = stock_of(name, several, foreach=True, **arguments)
    for step in range(100):
        set_gradients(step, mine, single, several)
        for optimizer in (ours, stock, foreach):
            optimizer.step()
    allowed = (several[0] - single[0]).abs().max() + 100 * torch.finfo(torch.float32).eps * single[0].abs().max()
    assert (mine[0] - single[0]).abs().max() <= allowed


@pytest.mark.parametrize("maximize", [False, True])
def test_lion(maximize: bool, device: str) -> None:
    """The formula of its paper."""

    def run() -> None:
        (p,) = mine = parameters([(50,)], torch.float64, device)
        ours = optim.Lion(mine, lr=0.1, betas=(0.8, 0.95), weight_decay=0.3, maximize=maximize)
        w, m = p.detach().clone(), torch.zeros_like(p)
        for step in range(3):
            set_gradients(step, mine)
            p.grad[:2] = 0.0
            g = -p.grad if maximize else p.grad
            w = w - 0.1 * ((0.8 * m + 0.2 * g).sign() + 0.3 * w)
            m = 0.95 * m + 0.05 * g
            ours.step()
            torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(ours.state[p], {"exp_avg": m.detach()}, rtol=1e-12, atol=1e-14)

    in_both_paths(run)


def test_lion_raises_as_its_like() -> None:
    weights = [nn.Parameter(torch.ones(3))]
    for wrong in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"weight_decay": -0.1}):
        with pytest.raises(ValueError, match="Invalid"):
            optim.Lion(weights, **wrong)
    weights[0].grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optim.Lion(weights).step()


@pytest.mark.kernels
def test_extreme_gradients(device: str) -> None:
    values = torch.tensor(
        [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, 1e-20, -1e15, 1e19], device=device
    )
    for _, name, arguments in STOCK_CALLS:
        mine, theirs = ([nn.Parameter(torch.ones_like(values))] for _ in range(2))
        ours = getattr(optim, name)(mine, **arguments)
        stock = stock_of(name, theirs, **arguments)
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


# --- Launches, uploads and bytes --------------------------------------------------------------------------------------


@pytest.mark.kernels
@interpreted
def test_three_hundred_tensors_take_one_launch(device: str) -> None:
    from fusednn.instruments.traffic import measure_traffic

    mine = parameters([(3,)] * 297 + [(2,)] * 3, torch.float32, device)
    mine[-1] = nn.Parameter(mine[-1].detach().bfloat16())
    ours = optim.SGD(mine, lr=0.1)
    set_gradients(0, mine)
    with mock.patch.object(kernels.optimizer, "launch"):  # which would take a while
        ours.step()
    with measure_traffic() as traffic:
        ours.step()
    assert [launch.kernel for launch in traffic.kernel_launches] == ["optimizer_update_kernel"] * 2  # float32, bfloat16
    assert [launch.programs for launch in traffic.kernel_launches] == [299, 1]
    # Everything else of a plain step is the profiler's.
    assert not [operation for operation in traffic.operations if not operation.name.startswith("profiler")]


@pytest.mark.kernels
@interpreted
def test_rows_are_uploaded_when_they_change(device: str) -> None:
    from fusednn.kernels.base.multi_tensor import Table

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
    from fusednn.instruments.traffic import measure_traffic

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
    from fusednn.instruments.traffic import measure_traffic

    mine = parameters([(5000,), (3,)], torch.float32, device)
    ours = optim.SGD(mine, lr=0.1, clip_norm=1.0)
    set_gradients(0, mine)
    with measure_traffic() as traffic:
        ours.step()
    assert [launch.kernel for launch in traffic.kernel_launches] == [
        "optimizer_squares_kernel",
        "optimizer_update_kernel",
    ]
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
