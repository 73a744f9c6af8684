"""The tests' tests: for each instrument and standing check, a broken kernel that must make it fail."""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusednn
from fusednn import kernels, optim
from fusednn.autograd import plans
from fusednn.kernels.base.launch import launch
from fusednn.optim import launches
from fusednn.testing import broken, check_against_stock, checked_bounds, poisoned_memory, random_tensor


def faulty_relu(fault: str) -> partial:
    return partial(broken.faulty_relu, fault=fault)


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("a wrong value", "value: error"),
        ("wrong gradient", "gradient: error"),
        ("random gradient", "gradient, run twice"),
        ("an unwritten tail", "value, run twice over different memory"),
        ("a modified input", "operand, after the call"),
    ],
)
def test_standing_checks_see_a_broken_kernel(fault: str, complaint: str, device: str) -> None:
    x, gradient = (random_tensor((2, 3, 5, 50), torch.float32, device, seed) for seed in (0, 1))
    check_against_stock(faulty_relu("no fault"), F.relu, [x], gradient)
    with pytest.raises(AssertionError, match=complaint):
        check_against_stock(faulty_relu(fault), F.relu, [x], gradient)


@pytest.mark.kernels
@pytest.mark.interpreter
def test_bounds_see_a_missing_mask(device: str) -> None:
    """Also where what lies behind the operand belongs to another of the same launch."""
    memory = random_tensor((4 * broken.BLOCK,), torch.float32, device)
    x, y = memory[:257], memory[257:514]
    for fault, seen in (("no fault", nullcontext()), ("a missing mask", pytest.raises(Exception, match="loads bytes"))):
        with checked_bounds(), seen:
            launch(broken.relu_configuration(fault), 2, x, y, x.numel())


@pytest.mark.kernels
@pytest.mark.interpreter
def test_bounds_see_what_a_table_does_not_list(device: str) -> None:
    """An optimizer that is told of too many elements strays into its neighbour."""
    memory = random_tensor((2, 8), torch.float32, device)
    for size, seen in ((3, nullcontext()), (8, pytest.raises(Exception, match="loads bytes"))):
        parameters = [nn.Parameter(row[:3]) for row in memory]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer = optim.SGD(parameters, lr=0.1)
        extents = [np.array([value] * 2) for value in (size, launches.CHUNK, 0)]
        with checked_bounds(), mock.patch.object(launches, "_extents", return_value=extents), seen:
            optimizer.step()


@pytest.mark.kernels
@pytest.mark.parametrize(
    "allocate",
    [
        lambda x: torch.empty_like(x),
        lambda x: torch.empty(3),
        lambda x: torch.empty_permuted((3,), (0,)),
        lambda x: torch.empty_strided((3,), (1,)),
        lambda x: x.new_empty(x.shape),
        lambda x: x.new_empty_strided((3,), (1,)),
    ],
)
def test_poisoned_memory_reaches_every_allocation(allocate: Callable[[Tensor], Tensor]) -> None:
    with poisoned_memory(0xA5):
        assert (allocate(torch.ones(3)).view(torch.uint8) == 0xA5).all()


@pytest.mark.kernels
def test_poisoned_memory_reaches_what_plans_allocate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_RECORDED_CALL", 1)
    x, own = torch.ones(3), plans.Plans(torch.empty_like)
    with poisoned_memory(0xA5):
        own.call(x)
        plan = own.find((x,))
        assert plan is not torch.empty_like
        assert (plan(x).view(torch.uint8) == 0xA5).all()


@pytest.mark.kernels
@pytest.mark.interpreter
def test_traffic_meter_sees_an_extra_pass(device: str) -> None:
    from fusednn.instruments.traffic import measure_traffic

    x = random_tensor((1024,), torch.float32, device)
    budget = 2 * x.numel() * x.itemsize
    moved = {}
    for fault in ("no fault", "an extra pass"):
        with measure_traffic() as traffic:
            faulty_relu(fault)(x)
        moved[fault] = traffic.bytes
    assert moved["no fault"] == budget
    assert moved["an extra pass"] > budget * 1.05


@pytest.mark.kernels
@pytest.mark.interpreter
def test_traffic_meter_sees_an_extra_launch(device: str) -> None:
    from fusednn.instruments.traffic import measure_traffic

    x = random_tensor((1000,), torch.float32, device)
    with measure_traffic() as traffic:
        faulty_relu("no fault")(faulty_relu("no fault")(x))
    assert traffic.launches == 2
    assert [launch.programs for launch in traffic.kernel_launches] == [4, 4]
    with measure_traffic() as copied:
        faulty_relu("no fault")(x.clone())
    assert [operation.name for operation in copied.operations] == ["clone"]


@pytest.mark.kernels
@pytest.mark.interpreter
def test_traffic_meter_sees_what_operators_change_in_place() -> None:
    from fusednn.instruments.traffic import measure_traffic

    x, y = torch.ones(2, 1000)
    with measure_traffic() as traffic:
        x.add_(y)
        torch._foreach_addcmul_([x], [y], [y])
    assert [(one.read_bytes, one.written_bytes) for one in traffic.operations] == [(8000, 4000)] * 2


def test_traffic_meter_counts_what_operators_touch() -> None:
    """Not all that they are given: a shape is nothing to read, and a loss picks an element of each row."""
    from fusednn.instruments.traffic import measure_traffic

    x, target = torch.zeros(10, 100, requires_grad=True), torch.zeros(10, dtype=torch.int64)
    with measure_traffic() as traffic:
        torch.zeros_like(x)
        F.nll_loss(x, target, reduction="none").backward(torch.ones(10))
    counted = {one.name: (one.read_bytes, one.written_bytes) for one in traffic.operations}
    assert counted["zeros_like"] == (0, 4000)
    assert counted["nll_loss_forward"] == (10 * 8 + 10 * 4, 10 * 4 + 4)
    assert counted["nll_loss_backward"][0] <= 10 * 8 + 10 * 4 + 4
    assert not [name for name in counted if "::" in name]


@pytest.mark.compiles
def test_compile_check_sees_a_spilling_tile() -> None:
    from fusednn.instruments.compile_check import compile_configuration

    result = compile_configuration(broken.spilling_configuration(), "sm_90")
    assert any(problem.startswith("spills") for problem in result.problems)


@pytest.mark.compiles
def test_compile_check_sees_narrow_accesses() -> None:
    from fusednn.instruments.compile_check import compile_configuration

    result = compile_configuration(broken.scalar_access_configuration(), "sm_90")
    assert result.problems == ["0 loads of 128 bits, 1 promised", "0 stores of 128 bits, 1 promised"]


@pytest.mark.compiles
def test_compile_check_sees_missing_tensor_cores_and_compiler_errors() -> None:
    from fusednn.instruments.compile_check import compile_configuration

    sound = broken.relu_configuration("no fault")
    assert not compile_configuration(sound, "sm_90").problems
    matrix = dataclasses.replace(sound, tensor_cores=True)
    assert compile_configuration(matrix, "sm_90").problems == ["no tensor-core instructions"]
    wrong_type = dataclasses.replace(sound, signature=(("x_pointer", "fp32"), *sound.signature[1:]))
    (problem,) = compile_configuration(wrong_type, "sm_90").problems
    assert "Error" in problem


@pytest.mark.kernels
@pytest.mark.interpreter
def test_compile_check_refuses_interpreted_functions() -> None:
    from fusednn.instruments.compile_check import compile_configuration

    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_configuration(broken.relu_configuration("no fault"), "sm_90")


# --- Launches that aren't made ----------------------------------------------------------------------------------------


def _training() -> Callable[[], Tensor]:
    """Steps of a small network, fused, with its optimizer and loss."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(8 * 49, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 10)),
    )
    fusednn.replace_layers(model, fuse=True)
    optimizer = optim.AdamW(model.parameters())
    loss_function = fusednn.layers.CrossEntropyLoss()
    x, target = torch.randn(8, 3, 16, 16), torch.arange(8)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = loss_function(model(x), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _counted(meter: Callable[[], Any]) -> Any:
    step = _training()
    with meter() as traffic:
        step()
        traffic.clear()
        step()
    return traffic


@pytest.mark.interpreter
def test_launches_that_are_not_made_are_those_that_are() -> None:
    from fusednn.instruments.launches import count_launches
    from fusednn.instruments.traffic import measure_traffic

    made, not_made = _counted(measure_traffic), _counted(count_launches)
    assert [one.kernel for one in not_made.kernel_launches] == [one.kernel for one in made.kernel_launches]
    assert [one.name for one in not_made.operations] == [one.name for one in made.operations]
    assert not_made.bytes == pytest.approx(made.bytes, rel=0.02)  # channels' vectors are loaded by several programs


@pytest.mark.interpreter
@pytest.mark.parametrize("biased", [True, False])
def test_what_is_passed_in_place_of_an_operand_is_not_counted(biased: bool) -> None:
    """Neither residual nor, in one case, a bias: the kernel is given the input in their place, and doesn't read it."""
    from fusednn.instruments.launches import count_launches
    from fusednn.instruments.traffic import measure_traffic

    x, bias = torch.randn(64, 128, requires_grad=True), torch.randn(128) if biased else None
    counted = []
    for meter in (measure_traffic, count_launches):
        with meter() as traffic:
            y = fusednn.autograd.bias_activation_dropout(x, bias, activation="gelu", p=0.5)
            y.backward(torch.ones_like(y))
        counted.append([one.loaded_bytes + one.stored_bytes for one in traffic.kernel_launches])
    assert counted[1] == pytest.approx(counted[0], rel=0.02)


@pytest.mark.stock
@pytest.mark.skipif(not kernels.AVAILABLE, reason="Triton is not installed")
def test_launches_are_counted_where_kernels_do_not_run() -> None:
    from fusednn.instruments.launches import count_launches

    step = _training()
    first, *_ = [step() for _ in range(4)]  # what is remembered of stock's path isn't asked
    traffic = _counted(count_launches)
    assert traffic.launches == 11
    assert torch.equal(_training()(), first)  # stock's path, as before
    assert step().isfinite()
