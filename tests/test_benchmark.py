"""Installed microbenchmarks: every operation can be measured, and what isn't a measurement is refused."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusednn import benchmark
from fusednn.benchmark import Effort, Measurement, Operation, Sweep
from fusednn.benchmark.clocks import Clocks, complaint, parse
from fusednn.catalogue import ROWS
from fusednn.commands import bench_one

LITTLE = Effort(1, 1, 1, 1)
#: Takes a group of processes.
GROUPED = "sync_batch_norm"
NAMES = [name for name in dict.fromkeys(row.name for row in ROWS) if name != GROUPED]


def operation(ours: Callable[..., Tensor], stock: Callable[..., Tensor] = F.relu) -> Operation:
    return Operation("mine", "mine", ours, stock, lambda shape, dtype: (2.0 * shape.numel(), 3.0 * shape.numel()))


@pytest.mark.parametrize("third", [0, *(pytest.param(third, marks=pytest.mark.thorough) for third in (1, 2))])
def test_every_operation_can_be_measured_or_counted(third: int) -> None:
    # In the interpreter a few: it is slow, and each family's own tests count there.
    from fusednn.kernels import INTERPRETING, ON_CPU

    if ON_CPU and not INTERPRETING:
        pytest.skip("the virtual GPU neither times nor counts")
    names = NAMES[third :: 12 if INTERPRETING else 3]
    sweep = benchmark.one(names, dtypes=torch.float32, effort=LITTLE)
    assert {one.operation for one in sweep} == set(names)
    for one in sweep:
        assert not one.refused, (one.operation, one.refused)
        assert one.samples or one.launches is not None
    assert {one.contestant for one in sweep} == {"fusednn", "eager"}
    assert len(sweep.notes) == 1
    json.dumps(sweep.to_dict())


def test_operations_that_need_more_than_tensors_say_so() -> None:
    with pytest.raises(ValueError, match=r"no values of: .*group"):
        benchmark.one(GROUPED)


@pytest.mark.interpreter
def test_counts_are_the_budgets() -> None:
    sweep = benchmark.one("gelu", (40, 60), torch.float32)
    ours = {one.direction: one for one in sweep if one.contestant == "fusednn"}
    assert {direction: (one.bytes, one.launches) for direction, one in ours.items()} == {
        "forward": (2 * 4 * 2400, 1),
        "backward": (3 * 4 * 2400, 1),
    }
    assert "nothing is timed" in str(sweep)


@pytest.mark.stock
def test_a_sweep_has_every_combination() -> None:
    sweep = benchmark.one(
        ["relu", "silu"],
        [(8, 8), (2, 3, 4, 5)],
        [torch.float32, torch.bfloat16],
        directions=["forward"],
        effort=LITTLE,
    )
    assert len(sweep) == 2 * 2 * 2 * 2
    assert {one.shape for one in sweep} == {(8, 8), (2, 3, 4, 5)}
    words = str(sweep)
    assert "relu bf16 2x3x4x5" in words
    assert "No GPU" in words
    (last,) = benchmark.one(
        "relu", (2, 3, 4, 5), torch.float32, against=[], memory_formats="channels_last", directions=["forward"]
    )
    assert last.memory_format == "channels_last"


# --- Mistakes that people make ----------------------------------------------------------------------------------------

_MEMORY = torch.empty(8, 8)


@pytest.mark.stock
@pytest.mark.parametrize(
    ("ours", "complaint"),
    [
        (lambda x: F.relu(x) * 1.5, "value is .* epsilons from eager"),
        (lambda x: F.relu(x.detach()) + 0 * x, "gradient of the first operand"),
        (lambda x: F.relu(x).double(), "torch.float64"),
        (lambda x: _Reused.apply(x), "writes its result over the last one's"),
        (lambda x: F.relu(x, nonsense=1), "TypeError"),
    ],
    ids=["wrong", "wrong gradient", "another dtype", "reused memory", "raises"],
)
def test_what_is_no_measurement_is_refused(ours: Callable[..., Tensor], complaint: str) -> None:
    (refused,) = benchmark.one(operation(ours), (8, 8), torch.float32, against=["eager"], effort=LITTLE)
    assert refused.contestant == "fusednn"
    assert not refused.samples
    with pytest.raises(AssertionError, match=complaint):
        raise AssertionError(refused.refused)


class _Reused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        _MEMORY.copy_(x.relu())
        return _MEMORY.view_as(_MEMORY)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] * (x > 0)


@pytest.mark.stock
def test_an_operation_of_ones_own() -> None:
    calls: list[bool] = []

    def ours(x: Tensor) -> Tensor:
        calls.append(x.is_leaf)
        return F.relu(x)

    sweep = benchmark.one(
        operation(ours), (8, 8), torch.float32, directions=["backward"], effort=Effort(1, 1, 1, host_rounds=1)
    )
    assert [one.contestant for one in sweep] == ["fusednn", "eager"]
    # Checked, found fresh and asked for its path (4 calls), then a graph for each set in two rounds: none more where
    # time is taken.
    assert len(calls) == 4 + 2 * 4
    assert sweep.measurements[0].bytes == 3 * 64


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"effort": Effort(warmup_rounds=0)}, "without warm-up"),
        ({"against": ["jax"]}, "unknown contestant jax"),
        ({"memory_formats": "rows"}, "unknown memory format rows"),
    ],
)
def test_what_cannot_be_asked(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        benchmark.one("relu", (8, 8), **arguments)


def test_names_are_those_of_the_catalogue() -> None:
    with pytest.raises(ValueError, match="no operation of the catalogue is called reul"):
        benchmark.one("reul")
    with pytest.raises(ValueError, match="mine needs a shape"):
        benchmark.one(operation(F.relu))


# --- Tables, pictures, clocks -----------------------------------------------------------------------------------------


def made_up() -> Sweep:
    """As on a GPU whose copy moves 2 TB/s."""
    eager = Measurement("relu", "bf16", (1000, 1000), "contiguous", "eager", "forward", device_us=(4.0, 4.0), bytes=4e6)
    ours = replace(eager, contestant="fusednn", device_us=(2.5, 2.5), host_us=(9.0,))
    more = replace(ours, shape=(2000, 1000), device_us=(5.0, 5.0), bytes=8e6)
    refused = replace(ours, contestant="compile", device_us=(), host_us=(), bytes=None, refused="HostBoundError: slow")
    return Sweep((eager, ours, more, refused), 2e12, 8e14, ("the clock fell",))


def test_a_table_has_rates_beside_a_copys() -> None:
    sweep = made_up()
    assert sweep.roofline(sweep.measurements[1]) == pytest.approx(0.8)
    product = replace(sweep.measurements[1], operations=int(1e9))
    assert sweep.roofline(product) == pytest.approx(0.8)  # 2 us by a copy's rate, 1.25 by a product's
    assert sweep.roofline(replace(product, operations=int(2e9))) == pytest.approx(1.0)
    lines = str(sweep).splitlines()
    assert lines[3].split()[-4:] == ["1600", "80", "%", "80"] or "1600" in lines[3]
    assert "1.60" in lines[3]
    assert "refused: HostBoundError: slow" in lines[5]
    assert lines[6:] == ["A copy moves 2000 GB/s.", "the clock fell"]


def test_a_sweep_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made_up().draw(tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="nothing was timed"):
        Sweep((), None, None, ()).draw(tmp_path / "nothing.png")


def test_clocks_are_watched() -> None:
    before = parse("1980, 41, 0x0000000000000000\n")
    assert before == Clocks(1980, 41, 0)
    assert parse("[N/A], 41, 0x0") is None
    assert complaint(before, Clocks(1950, 60, 0x1)) == ""  # idle by now
    words = complaint(before, Clocks(1400, 83, 0x24))
    assert words == "the clock was fell from 1980 to 1400 MHz, held down by heat and its power cap (83 degrees Celsius)"
    assert "nobody watched" in complaint(None, before)


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.mark.stock
def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_one.main(["relu", "--shape", "8x8", "--direction", "forward", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [one["contestant"] for one in printed["measurements"]] == ["fusednn", "eager"]
    assert all(len(one["wall_us"]) > 1 and not math.isnan(one["bytes"]) for one in printed["measurements"])
    assert bench_one.main(["max_pool2d", "--shape", "8"]) == 1
    assert "refused: " in capsys.readouterr().out
    assert bench_one.main(["reul"]) == 2
    assert "no operation" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    sweep = benchmark.one("gelu", (4096, 4096), against=("eager", "compile"))
    assert {one.contestant for one in sweep} == {"fusednn", "eager", "compile"}
    for one in sweep:
        assert one.device_us
        share = sweep.roofline(one)
        assert share is None or 0 < share < 1.2
