"""Runs that are cut short and go on, networks, peers, predictions and resources: the benchmarks' parts above a case."""

# ruff: noqa: E402
from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusednn import kernels, layers

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))  # the benchmarks are no package: they are not installed

import bench_activation
import bench_network
import predict
import resources
from fusednn_bench import measure, networks, peers, results, run, schema
from fusednn_bench.steps import StepCase, StepOperation, eager_step_work

from fusednn.benchmark.arithmetic import Work, eager_work
from fusednn.benchmark.cases import Case
from fusednn.benchmark.protocol import Contest, WrongResultError

pytestmark = pytest.mark.stock  # nothing here depends on where kernels run
CPU = torch.device("cpu")

# --- Runs -------------------------------------------------------------------------------------------------------------


@dataclass
class FakeCase:
    """A case that takes no time: it writes down who was asked to take part."""

    name: str
    held: list[tuple[str, ...]] = field(default_factory=list)
    missing: tuple[str, ...] = ()
    error: Exception | None = None

    @property
    def id(self) -> str:
        return f"{self.name}-bf16-large"

    def contestants(self, usual: tuple[str, ...]) -> tuple[str, ...]:
        return usual

    def hold(self, timer: Any, contestants: tuple[str, ...], effort: Any) -> Contest:
        self.held.append(contestants)
        if self.error is not None:
            raise self.error
        return Contest(
            [self._record(name) for name in contestants if name not in self.missing],
            dict.fromkeys(self.missing, "doesn't compile"),
        )

    def _record(self, contestant: str) -> dict[str, Any]:
        case = {"family": "a", "operation": self.name, "dtype": "bf16", "size": "large", "shape": [2, 3]}
        numbers = {"budget_bytes": 8, "calls_per_sample": 1, "sets": 4, "peak_bytes": 1, "kept_bytes": 1}
        samples = {"device_us": [1.0 + i / 7 for i in range(24)], "host_us": [], "error_epsilons": 0.1}
        return {**case, "contestant": contestant, "direction": "forward", **numbers, **samples}

    def count(self, *, checked: bool = True) -> list[dict[str, Any]]:
        self.held.append(("counted",))
        return [{**self._record("fusednn"), "bytes": 4, "launches": 1}]


measure.hold.register(FakeCase)(FakeCase.hold)
measure.count.register(FakeCase)(FakeCase.count)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Begins a timed run on a device that isn't there, which saves to one file."""
    described = {"device": "Some GPU", "torch": "2", "triton": "3", "python": "3"}
    ceilings = {
        "copy": {"bytes": 8, "samples_us": [1.0]},
        "matrix_product": {"operations": 8, "dtype": "bf16", "samples_us": [1.0]},
    }
    source = {"commit": "a" * 40, "dirty": False, "sha256": "b" * 64}
    monkeypatch.setattr(run, "DeviceTimer", lambda: object())
    monkeypatch.setattr(run, "measure_ceilings", lambda timer, before: ceilings)
    monkeypatch.setattr(run, "describe_environment", lambda: dict(described))
    monkeypatch.setattr(run, "describe_sources", lambda: dict(source))
    # PyTorch's own samples, where other tests imported them, forbid to set switches for good.
    monkeypatch.setitem(torch.backends.flags_frozen.__globals__, "__allow_nonbracketed_mutation_flag", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)

    def begin(*, full: bool = False, seconds: float = 60.0, timed: bool = True) -> run.Run:
        return run.Run(timed=timed, full=full, folder=None, file=tmp_path / "result.json", seconds=seconds)

    return SimpleNamespace(begin=begin, file=tmp_path / "result.json", environment=described, source=source)


def test_every_case_is_saved_when_it_is_done(start: Any) -> None:
    session = start.begin()
    assert torch.backends.cudnn.benchmark
    session.contest(FakeCase("one"))
    saved = results.load_result(start.file)
    assert not saved["complete"]
    assert {record["contestant"] for record in saved["cases"]} == {"fusednn", "eager", "compile"}
    assert saved["cases"][0]["device_spread_us"]["samples"] == 24
    session.contest(FakeCase("two"))
    session.finish(complete=True)
    saved = results.load_result(start.file)
    assert saved["complete"]
    assert len(saved["cases"]) == 6
    assert saved["settings"]["effort"]["warmup_rounds"] == 2


def test_a_run_goes_on_where_another_was_cut_short(start: Any) -> None:
    start.begin().contest(FakeCase("one", missing=("compile",)))
    again, other = FakeCase("one", missing=("compile",)), FakeCase("two")
    session = start.begin()
    contest = session.contest(again)
    assert again.held == []  # what the file holds isn't measured again, nor what couldn't take part
    assert len(contest.records) == 2
    assert contest.left_out == {"compile": "doesn't compile"}
    session.contest(other)
    session.contest(other)
    assert len(other.held) == 1
    session.finish(complete=True)
    assert schema.problems(json.loads(start.file.read_text())) == []


def test_a_case_without_all_contestants_begins_anew(start: Any) -> None:
    start.begin().contest(FakeCase("one"))
    case = FakeCase("one")
    start.begin(full=True).contest(case)
    assert case.held == [run.CONTESTANTS]  # all of them: in turns, or not comparable
    saved = results.load_result(start.file)
    assert len(saved["cases"]) == len(run.CONTESTANTS)


def test_what_had_no_time_left_is_measured_later(start: Any) -> None:
    session = start.begin(seconds=-1.0)
    late = FakeCase("late")
    assert set(session.contest(late).left_out.values()) == {"time limit"}
    session.finish(complete=True)
    assert late.held == []
    assert not start.file.exists()  # nothing was measured
    start.begin().contest(FakeCase("one"))
    session = start.begin(seconds=-1.0)
    session.contest(FakeCase("one"))
    session.contest(late)
    session.finish(complete=True)
    assert not results.load_result(start.file)["complete"]
    session = start.begin()
    session.contest(FakeCase("one"))
    session.contest(late)
    session.finish(complete=True)
    saved = results.load_result(start.file)
    assert saved["complete"]
    assert saved["left_out"] == []
    assert len(saved["cases"]) == 6


def test_a_case_that_fails_is_left_out_and_tried_again(start: Any) -> None:
    session = start.begin()
    session.contest(FakeCase("one"))
    with pytest.raises(RuntimeError, match="broken"):
        session.contest(FakeCase("two", error=RuntimeError("broken")))
    (left_out,) = results.load_result(start.file)["left_out"]
    assert left_out == {"case": "two-bf16-large", "contestant": None, "reason": "RuntimeError: broken"}
    repaired = FakeCase("two")
    start.begin().contest(repaired)
    assert len(repaired.held) == 1
    assert results.load_result(start.file)["left_out"] == []


@pytest.mark.parametrize(
    ("facts", "key", "value"),
    [("environment", "device", "Another GPU"), ("environment", "torch", "3"), ("source", "sha256", "c" * 64)],
)
def test_what_was_measured_elsewhere_is_not_continued(start: Any, facts: str, key: str, value: str) -> None:
    start.begin().contest(FakeCase("one"))
    getattr(start, facts)[key] = value
    with pytest.raises(run.ResumeError, match=value):
        start.begin()
    with pytest.raises(run.ResumeError, match="kind"):
        start.begin(timed=False)


def test_a_falsified_file_is_not_continued(start: Any) -> None:
    start.begin().contest(FakeCase("one"))
    broken = json.loads(start.file.read_text())
    broken["cases"][0]["device_us"].pop()
    start.file.write_text(json.dumps(broken))
    with pytest.raises(results.InvalidResultError, match="samples of the device time are missing"):
        start.begin()


# --- Networks ---------------------------------------------------------------------------------------------------------


class Losing(nn.Module):
    """Ends in scores that are half of the right ones."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x) / 2
        return y


@pytest.mark.parametrize("case", bench_network.counted_cases(), ids=lambda case: case.id)
def test_networks_train_the_same_on_all_sides(case: networks.NetworkCase, monkeypatch: pytest.MonkeyPatch) -> None:
    assert networks.check(case, "fusednn", CPU) < 100
    assert networks.check(case, "eager", CPU) < 100
    monkeypatch.setattr(networks, "to_fusednn", lambda model, *, recompute: Losing(model))
    with pytest.raises(WrongResultError):
        networks.check(case, "fusednn", CPU)


def test_our_networks_are_of_our_layers() -> None:
    model = networks.to_fusednn(bench_network.maxout_mlp(8))
    assert [type(layer) for layer in model[1:3]] == [layers.Dropout, layers.Maxout]
    stock = bench_network.resnet(2)
    ours = networks.to_fusednn(stock)
    assert stock.state_dict().keys() == ours.state_dict().keys()
    assert not any(type(module).__module__.startswith("fusednn") for module in stock.modules())


def test_maxout_in_plain_pytorch_is_maxout() -> None:
    stock = networks.StockMaxout(5, 7, 3)
    ours = networks.to_fusednn(nn.Sequential(stock))
    x = torch.randn(4, 5)
    torch.testing.assert_close(ours(x), stock(x))


def test_steps_of_networks_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class FakeTrainer:
        def __init__(self, case: Any, contestant: str, device: Any) -> None:
            self.contestant = contestant

        def step(self) -> None:
            order.append(self.contestant)

    def check(case: Any, contestant: str, device: Any) -> float:
        if contestant == "compile":
            raise WrongResultError("wrong")
        return 0.5

    timer = SimpleNamespace(sample=lambda make_calls: [call() or 1.0 for call in make_calls()])
    monkeypatch.setattr(networks, "Trainer", FakeTrainer)
    monkeypatch.setattr(networks, "check", check)
    monkeypatch.setattr(networks, "_memory", lambda trainer: {"peak_bytes": 5, "kept_bytes": 3})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    (case, *_) = bench_network.timed_cases(full=False)
    contest = measure.hold(case, timer, ("fusednn", "eager", "compile"), run.Effort())
    assert contest.left_out == {"compile": "WrongResultError: wrong"}
    assert order[2:10] == ["fusednn"] * 4 + ["eager"] * 4
    fused, eager = (results.with_spreads(record) for record in contest.records)
    assert (fused["contestant"], eager["contestant"], fused["images"]) == ("fusednn", "eager", 64)
    assert fused["device_spread_us"]["samples"] == 48
    assert fused["wall_spread_us"]["samples"] == 30
    assert list(schema._case_problems(fused, "timed", {})) == []


def test_timed_networks_are_those_that_goals_speak_of() -> None:
    quick = bench_network.timed_cases(full=False)
    assert {case.operation.name for case in quick} == {"vgg", "resnet", "maxout_mlp", "lenet_digits"}
    assert {"fusednn-compile", "fusednn-recompute"} < set(quick[0].contestants(("fusednn",)))


# --- Peers ------------------------------------------------------------------------------------------------------------


def _modules(monkeypatch: pytest.MonkeyPatch, **modules: dict[str, Any]) -> None:
    """Pretend that these modules, dots as two underscores, are installed, and no other peer."""
    found = {name.replace("__", "."): SimpleNamespace(**contents) for name, contents in modules.items()}
    monkeypatch.setattr(peers, "find_spec", lambda name: found.get(name))
    monkeypatch.setattr(peers, "import_module", found.__getitem__)


def test_peers_that_are_not_installed_do_not_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    _modules(monkeypatch)
    for found in (peers.softmax_peers(), peers.cross_entropy_peers(), peers.activation_peers("gelu")):
        assert found == {}
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))  # a package of that name that isn't NVIDIA's
    assert not peers.installed("apex.optimizers")


def test_peers_compute_what_stock_does(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = {
        "softmax": torch.softmax,
        "softmax_backward": torch._softmax_backward_data,
        "silu": torch.nn.functional.silu,
        "silu_backward": torch.ops.aten.silu_backward,
        "tanh": torch.tanh,
        "tanh_backward": torch.ops.aten.tanh_backward,
    }
    _modules(monkeypatch, flag_gems__ops=ops, quack={"softmax": lambda x: x.softmax(1)})
    found = peers.softmax_peers()
    assert set(found) == {"flag_gems", "quack"}
    assert peers.activation_peers("gelu") == peers.activation_peers("relu") == {}
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    functions = (
        found["flag_gems"],
        peers.activation_peers("silu")["flag_gems"],
        peers.activation_peers("tanh")["flag_gems"],
    )
    for function in functions:
        assert torch.autograd.gradcheck(function, x)


def test_ligers_cross_entropy_works_on_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def writes_over_its_input(x: Tensor, target: Tensor) -> Tensor:
        return x.zero_().sum()

    _modules(monkeypatch, liger_kernel__transformers__functional={"liger_cross_entropy": writes_over_its_input})
    x = torch.ones(2, 3)
    peers.cross_entropy_peers()["liger"](x, torch.zeros(2, dtype=torch.int64))
    assert bool((x == 1).all())


def test_quacks_loss_is_converted_to_the_type_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    _modules(monkeypatch, quack={"cross_entropy": lambda x, target: x.float().sum()})
    x, target = torch.ones(2, 3, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64)
    assert peers.cross_entropy_peers()["quack"](x, target).dtype is torch.bfloat16


# --- Predictions and resources ----------------------------------------------------------------------------------------


def test_eagers_work_is_counted_at_a_shape_without_doing_it() -> None:
    relu = Case(bench_activation.OPERATIONS["relu"], torch.bfloat16, "huge", (2**20, 2**10))
    assert {direction: work.bytes for direction, work in eager_work(relu).items()} == {
        "forward": 2 * 2**31,
        "backward": 3 * 2**31,
        "forward_backward": 5 * 2**31,
    }
    adam = StepCase(StepOperation("adam", "Adam", "adam"), torch.float32, "some", ((2**10, 2**10),))
    assert eager_step_work(adam).bytes == pytest.approx(72 * 2**20, rel=0.01)


def test_eagers_products_and_dropout_are_those_of_a_gpu() -> None:
    import bench_conv
    import bench_dropout

    stage = bench_conv.OPERATIONS["conv_act_pool2d_vgg_middle"]
    work = eager_work(Case(stage, torch.bfloat16, "batch_1", (1, 128, 56, 56)))
    assert work["forward"].operations == 2 * 56 * 56 * 256 * 128 * 9
    assert work["backward"].operations == 2 * work["forward"].operations
    dropout = Case(bench_dropout.OPERATIONS["dropout"], torch.bfloat16, "some", (2, 4, 32, 32))
    assert eager_work(dropout)["forward"].bytes == 5 * dropout.numel  # in and out in 2 bytes, and a mask of 1


def test_predictions_are_bounds_of_memory_products_and_instructions() -> None:
    machine = {"copy_bytes_per_second": 1e12, "matrix_operations_per_second": 1e14}
    work = Work(4_000_000, 300_000_000)
    ours, eager = predict._pair(lambda name: {"contestant": name}, 2e6, work, 2e-6, machine)
    assert (ours["predicted_us"], ours["operations_bound"]) == (pytest.approx(3.0), True)
    assert (eager["predicted_us"], eager["operations_bound"]) == (pytest.approx(4.0), False)
    ours, eager = predict._pair(lambda name: {"contestant": name}, 2e6, work, 5e-6, machine)
    assert (ours["predicted_us"], ours["operations_bound"]) == (pytest.approx(5.0), False)
    assert (eager["predicted_us"], eager["instructions_us"]) == (pytest.approx(4.0), 0)


@pytest.mark.compiles
def test_resources_of_a_kernel_on_every_target() -> None:
    from fusednn.instruments.compile_check import TARGETS
    from fusednn.instruments.resources import resources_for

    (configuration,) = (one for one in kernels.shipped("activation") if one.label == "relu forward + mask bf16")
    for target in TARGETS:
        found = resources_for(configuration, target)
        assert (found.target, found.threads, found.spills, found.access_bits) == (target, 128, 0, 128)
        assert 16 < found.registers < 128
        assert 0.2 < found.occupancy <= 1
        assert not found.tensor_cores
    (configuration,) = (one for one in kernels.shipped("maxout") if one.label == "linear maxout of 2 64x32 bf16")
    assert all(resources_for(configuration, target).tensor_cores for target in ("sm_100", "gfx942"))


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("target", "threads", "registers", "shared", "share"),
    [
        ("sm_90", 128, 32, 0, 1.0),
        ("sm_90", 128, 64, 0, 0.5),
        ("sm_90", 128, 65, 0, 28 / 64),  # 72 registers: seven warps in each part
        ("sm_90", 256, 128, 0, 0.25),
        ("sm_90", 128, 32, 100 * 1024, 8 / 64),  # two programs
        ("sm_90", 128, 32, 300 * 1024, 0.0),  # none
        ("sm_90", 32, 32, 0, 0.5),  # 32 programs at most
        ("gfx942", 256, 128, 0, 0.5),
        ("gfx942", 256, 64, 80 * 1024, 0.0),
    ],
)
def test_occupancy(target: str, threads: int, registers: int, shared: int, share: float) -> None:
    from fusednn.instruments.resources import occupancy

    assert occupancy(target, threads, registers, shared) == share


@pytest.mark.compiles
def test_every_kernel_has_a_representative() -> None:
    found = resources.representatives()
    assert set(found) == {one.kernel.__name__ for one in kernels.shipped() if not one.rare}
    assert not any(one.rare for one in found.values())
