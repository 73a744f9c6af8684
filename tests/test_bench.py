"""The benchmarks' own code: statistics, timing, validity, result files, reports, and the command that runs them."""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusednn import optim
from fusednn.benchmark import ceilings, contest, protocol, timing, validity
from fusednn.commands import bench as command

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))  # the benchmarks are no package: they are not installed

import bench_activation
import bench_optimizer
import parameter_lists
from fusednn_bench import replay, steps
from fusednn_bench.steps import StepCase

from fusednn.benchmark.cases import Case, make_inputs
from fusednn.benchmark.quantiles import median, quantile, spread

CPU = torch.device("cpu")
FAMILIES = [import_module(path.stem) for path in sorted(BENCH.glob("bench_*.py"))]


# --- Statistics and timing ------------------------------------------------------------------------------------------


def test_quantiles_are_numpys() -> None:
    samples = [5.0, 1.0, 9.0, 2.0, 7.0, 7.0]
    tensor = torch.tensor(samples, dtype=torch.float64)
    for q in (0.0, 0.1, 0.25, 0.5, 0.9, 1.0):
        assert quantile(samples, q) == pytest.approx(float(tensor.quantile(q)))
    assert spread(samples).median == median(samples) == 6.0
    assert median([3.0]) == 3.0


def test_no_samples_have_no_median() -> None:
    with pytest.raises(ValueError, match="no samples"):
        median([])


def test_contestants_take_turns_in_rotating_order() -> None:
    order: list[str] = []

    def sample(contestant: str) -> list[float]:
        order.append(contestant)
        return [float(len(order))]

    samples = timing.interleave({"a": "a", "b": "b"}, 3, sample)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert samples == {"a": [1.0, 4.0, 5.0], "b": [2.0, 3.0, 6.0]}


class FakeCuda:
    """A device whose clock moves by ``work``, and whose spinning ends early ``early`` times."""

    def __init__(self, early: int = 0) -> None:
        self.now = 0.0
        self.early = early
        self.spins: list[float] = []
        self.Event = lambda enable_timing=False: FakeEvent(self)

    def synchronize(self) -> None:
        pass

    def _sleep(self, cycles: int) -> None:
        self.spins.append(cycles)
        self.now += cycles / 1000  # 1000 cycles a microsecond

    def work(self, microseconds: float) -> None:
        self.now += microseconds


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def record(self) -> None:
        self.time = self.cuda.now

    def query(self) -> bool:
        self.cuda.early -= 1
        return self.cuda.early >= 0

    def elapsed_time(self, after: FakeEvent) -> float:
        return (after.time - self.time) / 1000


def _timer(monkeypatch: pytest.MonkeyPatch, early: int = 0) -> tuple[timing.DeviceTimer, FakeCuda]:
    fake = FakeCuda(early)
    monkeypatch.setattr(timing, "cuda", fake)
    return timing.DeviceTimer(), fake


def _calls(fake: FakeCuda, *durations: float) -> list[Callable[[], None]]:
    return [lambda duration=duration: fake.work(duration) for duration in durations]


def test_device_time_of_each_call_and_of_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    timer, fake = _timer(monkeypatch)
    assert timer.sample(lambda: _calls(fake, 10, 20, 30, 40, 50)) == pytest.approx([10, 20, 30, 40, 50])
    assert timer.sample(lambda: _calls(fake, 10, 20, 30, 40, 50), group=2) == pytest.approx([15, 35, 50])


def test_samples_taken_behind_the_host_are_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    timer, fake = _timer(monkeypatch, early=2)
    prepared: list[int] = []

    def make_calls() -> list[Callable[[], None]]:
        prepared.append(1)
        return _calls(fake, 10)

    fake.spins.clear()
    assert timer.sample(make_calls) == pytest.approx([10])
    assert len(prepared) == 3  # a graph is used once
    assert fake.spins == [500_000, 1_000_000, 2_000_000]


def test_a_slow_round_does_not_slow_down_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    timer, fake = _timer(monkeypatch, early=6)
    timer.sample(lambda: _calls(fake, 10))
    fake.spins.clear()
    for _ in range(60):
        timer.sample(lambda: _calls(fake, 10))
    assert max(fake.spins) > 20_000_000
    assert fake.spins[-1] < 1_000_000


def test_a_host_that_never_catches_up_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    timer, fake = _timer(monkeypatch, early=1000)
    with pytest.raises(timing.HostBoundError):
        timer.sample(lambda: _calls(fake, 10))


def test_host_time_is_the_mean_of_the_calls() -> None:
    waited: list[int] = []
    (sample,) = timing.host_times(lambda: [lambda: time.sleep(0.002)] * 3, lambda: waited.append(1))
    assert 2000 <= sample < 50_000
    assert len(waited) == 2


def test_wall_time_lasts_until_the_device_is_done() -> None:
    (sample,) = timing.wall_times(lambda: [lambda: None] * 2, lambda: time.sleep(0.02))
    assert 10_000 <= sample < 50_000  # 20 ms for two calls


def test_ceilings_are_sampled_and_added_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "COPY_BYTES", 2**12)
    monkeypatch.setattr(ceilings, "PRODUCT_SIDE", 8)
    monkeypatch.setattr(ceilings, "DEVICE", CPU)
    timer, _ = _timer(monkeypatch)
    first = ceilings.measure_ceilings(timer)
    assert {name: len(measured["samples_us"]) for name, measured in first.items()} == {"copy": 16, "matrix_product": 16}
    assert (first["copy"]["bytes"], first["matrix_product"]["operations"]) == (2**12, 2 * 8**3)
    second = ceilings.measure_ceilings(timer, first)
    assert len(second["copy"]["samples_us"]) == 32


def test_pytest_benchmark_gets_the_samples() -> None:
    seen: list[float] = []

    def pedantic(target: Callable[[], None], rounds: int) -> None:
        for _ in range(rounds):
            start = replay.device_clock()
            target()
            seen.append(replay.device_clock() - start)

    replay.replay(SimpleNamespace(pedantic=pedantic), [10.0, 30.0, 20.0])
    assert seen == pytest.approx([10e-6, 30e-6, 20e-6])


# --- Cases and validity ---------------------------------------------------------------------------------------------


def _case(ours: Callable[..., Tensor], name: str = "relu", dtype: torch.dtype = torch.float32) -> Case:
    return Case(replace(bench_activation.OPERATIONS[name], ours=ours), dtype, "large", (4, 6, 16, 16))


@pytest.mark.parametrize("name", bench_activation.OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_eager_is_valid(name: str, dtype: torch.dtype) -> None:
    case = _case(bench_activation.OPERATIONS[name].stock, name, dtype)
    assert validity.check(case, case.operation.ours, make_inputs(case, CPU, 0)) >= 0


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.relu(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def _one_wrong_element(x: Tensor) -> Tensor:
    y = F.relu(x)
    wrong = torch.zeros_like(y)
    wrong.view(-1)[-1] = 1
    return y + wrong


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("relu", F.gelu),
        ("relu", _one_wrong_element),
        ("relu", _WrongGradient.apply),
        ("relu", lambda x: F.relu(x) + float("nan")),
        ("relu", lambda x: F.relu(x).double()),
        ("prelu", lambda x, w: F.prelu(x, w.detach()) + 0 * w.view(1, -1, 1, 1)),
        ("rrelu", lambda x: F.leaky_relu(x, 0.2)),
        ("rrelu", lambda x: F.rrelu(x, 0.5, 0.9, training=True)),
    ],
    ids=["formula", "element", "gradient", "nan", "dtype", "slopes", "not random", "bounds"],
)
def test_wrong_contestants_are_caught(name: str, function: Callable[..., Tensor]) -> None:
    case = _case(function, name)
    with pytest.raises(protocol.WrongResultError):
        validity.check(case, function, make_inputs(case, CPU, 0))


def test_peers_take_part_beside_the_usual_contestants() -> None:
    operation = replace(bench_activation.OPERATIONS["relu"], peers=lambda: {"other library": F.relu6})
    case = Case(operation, torch.float32, "large", (4, 4))
    assert contest._contestant("other library", case) is F.relu6
    assert contest._contestant("eager", case) is operation.stock


def test_quick_run_has_every_operation_large_and_fusednn_is_not_stock() -> None:
    quick = bench_activation.timed_cases(full=False)
    large = {case.operation.name for case in quick if case.size == "large" and case.dtype is torch.bfloat16}
    assert large == set(bench_activation.OPERATIONS)
    assert len(quick) < 40 < len(bench_activation.timed_cases(full=True))
    assert {case.size for case in quick} == set(bench_activation.SIZES)
    for case in quick:
        assert case.size != "large" or case.numel * case.dtype.itemsize >= contest.LARGE_BYTES
        assert case.operation.ours != case.operation.stock


def test_a_case_may_forbid_tf32() -> None:
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [switch.fp32_precision for switch in switches]
    for wanted, precision in ((True, "tf32"), (False, "ieee")):
        with contest.float32_products(wanted):
            assert [switch.fp32_precision for switch in switches] == [precision] * 2
        assert [switch.fp32_precision for switch in switches] == before
    with contest.float32_products(None):
        assert [switch.fp32_precision for switch in switches] == before


def test_cases_have_names_of_their_own() -> None:
    """A result file is continued by them."""
    for cases in ([case for one in FAMILIES for case in one.timed_cases(True)], _counted_cases()):
        ids = [case.id for case in cases]
        assert len(set(ids)) == len(ids)


def _counted_cases() -> list[Any]:
    return [case for one in FAMILIES for case in one.counted_cases()]


def test_every_optimizer_has_a_benchmark() -> None:
    measured = {operation.cls for operation in bench_optimizer.OPERATIONS.values()}
    stock = {cls.__name__ for cls in optim.FusedOptimizer.__subclasses__() if hasattr(torch.optim, cls.__name__)}
    assert measured == stock  # Lion has no opponent in PyTorch


def test_parameter_lists_are_those_of_the_networks() -> None:
    assert {network: len(shapes) for network, shapes in bench_optimizer.SIZES.items()} == {
        "resnet50": 161,
        "transformer_1b": 201,
    }
    assert {network: sum(map(math.prod, shapes)) for network, shapes in bench_optimizer.SIZES.items()} == {
        "resnet50": 25_557_032,
        "transformer_1b": 1_100_048_384,
    }
    assert json.loads(parameter_lists.FILE.read_text()) == json.loads(json.dumps(parameter_lists.networks()))


@pytest.mark.parametrize("name", bench_optimizer.OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_wrong_steps_are_caught(name: str, dtype: torch.dtype) -> None:
    case = StepCase(bench_optimizer.OPERATIONS[name], dtype, "counted", ((3, 4), (2,), (5,), (6,), (7,)))
    makers = case.operation.contestants()
    assert steps.check_step(case, makers["eager"], CPU) >= 0

    for make in (lambda parameters, lr: makers["eager"](parameters, lr / 2), lambda parameters, lr: lambda: None):
        with pytest.raises(protocol.WrongResultError):
            steps.check_step(case, make, CPU)


def test_rotation_exceeds_three_times_the_cache() -> None:
    l2 = 60 * 2**20
    for case in bench_activation.timed_cases(full=True):
        sets = contest.sets_needed(case, l2)
        rotated = sets * case.numel * case.dtype.itemsize
        assert sets >= 4
        assert rotated > 3 * l2 if case.size == "large" else sets <= 16


# --- Commands -------------------------------------------------------------------------------------------------------


def _parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench = parser.add_subparsers(dest="command").add_parser("bench")
    command.add_arguments(bench)
    return parser.parse_args(["bench", *arguments])


@pytest.mark.parametrize(
    "arguments", [(), ("--full", "-k", "relu or gelu", "-x"), ("-x", "--output=a", "b", "--", "-c")]
)
def test_bench_passes_everything_on_to_pytest(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []

    def fake_run(line: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        called.append(line)
        return subprocess.CompletedProcess(line, 5)

    monkeypatch.setattr(command.subprocess, "run", fake_run)
    assert command.run(_parse(*arguments)) == 5
    assert called == [[sys.executable, "-m", "pytest", str(BENCH), *arguments]]


@pytest.mark.parametrize("program", ["report", "predict", "resources", "baseline"])
def test_bench_runs_the_programs_beside_it(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []

    def fake_run(line: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        called.append(line)
        return subprocess.CompletedProcess(line, 1)

    monkeypatch.setattr(command.subprocess, "run", fake_run)
    assert command.run(_parse(program, "--help", "a")) == 1
    assert called == [[sys.executable, str(BENCH / f"{program}.py"), "--help", "a"]]
    assert (BENCH / f"{program}.py").is_file()


def test_bench_without_a_checkout_is_wrong_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "__file__", str(tmp_path / "site-packages" / "fusednn" / "commands" / "bench.py"))
    monkeypatch.chdir(tmp_path)
    assert command.run(_parse("-x")) == 2
    assert "checkout" in capsys.readouterr().err
    monkeypatch.chdir(BENCH.parent)
    assert command.find_benchmarks() == BENCH


def test_bench_without_pytest_is_wrong_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert command.run(_parse()) == 2
    assert "pip install pytest pytest-benchmark" in capsys.readouterr().err


def test_bench_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(_parse("--help")) == 0
    assert "--full" in capsys.readouterr().out


def counted(cases: str, folder: Path) -> Any:
    """The result file of a run, in a process of its own, that counts these cases."""
    line = [sys.executable, "-m", "pytest", str(BENCH), "-q", "-k", cases, f"--output={folder}"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stdout
    (file,) = folder.glob("*-counted.json")
    return json.loads(file.read_text())


@pytest.mark.stock
def test_counting_steps_end_to_end(tmp_path: Path) -> None:
    ours, eager = counted("adamw-fp32", tmp_path)["cases"]
    assert (ours["contestant"], ours["kernel_launches"]) == ("fusednn", 1)
    assert 28 <= ours["bytes"] / ours["elements"] <= 1.05 * 28
    assert eager["bytes"] / eager["elements"] == pytest.approx(80, rel=0.01)


@pytest.mark.stock
def test_counting_run_end_to_end(tmp_path: Path) -> None:
    result = counted("relu6-bf16", tmp_path)
    assert [case["bytes"] / case["elements"] for case in result["cases"]] == [4.125, 4.125, 4.0, 6.0]
    assert [case["launches"] for case in result["cases"]] == [1, 1, 1, 1]
