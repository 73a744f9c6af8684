"""GPUs that kernels don't run on, or not with every configuration: made-up ones, and launches that fail."""

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusednn
from fusednn import autograd, kernels
from fusednn.autograd.dispatch import observe_choices
from fusednn.commands import info
from fusednn.kernels import conv, linear_maxout
from fusednn.kernels.base import device as devices
from fusednn.kernels.base import launch as launching
from fusednn.kernels.base.device import Device, LaunchError, device_at, device_refusal

H100, RTX_50, MI200 = Device("sm_90", 32, 232_448), Device("sm_120", 32, 101_376), Device("gfx90a", 64, 65_536)


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    for function in (devices.device_at, devices._refusal):
        function.cache_clear()
    yield
    for function in (devices.device_at, devices._refusal):
        function.cache_clear()
    devices._failed.clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A made-up GPU: its properties as PyTorch and Triton tell them."""
    properties = SimpleNamespace(major=9, minor=0, gcnArchName="gfx942:sramecc+:xnack-", warp_size=32, shared=232_448)
    asked = SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": properties.shared})
    driver = SimpleNamespace(active=SimpleNamespace(utils=asked))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(devices, "triton", SimpleNamespace(runtime=SimpleNamespace(driver=driver)))
    properties.driver = driver
    return properties


@pytest.mark.parametrize(
    ("capability", "refusal"),
    [
        ((7, 0), "compute capability 7.0: kernels need 8.0"),
        ((7, 5), "compute capability 7.5: kernels need 8.0"),
        ((8, 0), None),
        ((8, 9), None),
        ((9, 0), None),
        ((10, 3), None),
        ((12, 0), None),
    ],
)
def test_old_gpus_are_refused(capability: tuple[int, int], refusal: str | None, gpu: Any) -> None:
    gpu.major, gpu.minor = capability
    assert device_refusal(0) == refusal


@pytest.mark.parametrize(
    ("architecture", "warp_size", "refusal"),
    [
        ("gfx90a:sramecc+:xnack-", 64, None),
        ("gfx942", 64, None),
        ("gfx1100", 32, None),
        ("gfx906:sramecc-:xnack-", 64, "no kernels for gfx906"),
        ("gfx1030", 32, "no kernels for gfx1030"),
    ],
)
def test_amds_gpus_are_those_of_a_list(
    architecture: str, warp_size: int, refusal: str | None, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    gpu.gcnArchName, gpu.warp_size, gpu.shared = architecture, warp_size, 65_536
    assert device_refusal(0) == refusal
    assert device_at(0) == Device(architecture.partition(":")[0], warp_size, 65_536)


def test_little_shared_memory_is_refused(gpu: Any) -> None:
    gpu.shared = 48 * 1024
    assert device_refusal(0) == "49152 bytes of shared memory: kernels need 65536"


def test_a_host_without_a_compiler_is_refused(gpu: Any) -> None:
    class Driver:
        @property
        def active(self) -> Any:
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    devices.triton.runtime.driver = Driver()
    assert device_refusal(0) == (
        "Triton can't be used: Failed to find C compiler. Please specify via CC environment variable."
    )


def test_devices_are_asked_once(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    device_refusal(0)
    monkeypatch.delattr(devices, "triton")
    assert device_refusal(0) is None


def test_info_tells_what_is_refused(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.major, gpu.minor = 7, 5
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    told = info._cuda_path(cuda=True)
    assert told == (
        "stock operators: compute capability 7.5: kernels need 8.0"
        if kernels.AVAILABLE
        else "stock operators: Triton is not installed"
    )


# --- Choices between configurations -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "has_tf32"), [(H100, True), (MI200, False)])
def test_tf32_is_asked_of_devices_that_have_it(device: Device, has_tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "device_at", lambda index: device)
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "tf32"
        assert linear_maxout._precision(torch.float32, device) == ("tf32" if has_tf32 else "fp32")
        assert conv.precision(torch.ones(1)) == ("tf32" if has_tf32 else "fp32")
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


@pytest.mark.parametrize("pieces", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiles_leave_room_for_operands_in_registers(pieces: int, dtype: torch.dtype) -> None:
    if dtype is torch.float32 and pieces > 4:
        return
    for device in (H100, RTX_50):
        configuration, programs = linear_maxout._fused_for(4096, 1024, pieces, dtype, device)
        assert device.takes_large_tiles or not configuration.large
        constants = dict(configuration.constants)
        assert programs == 4096 * 1024 // (constants["HEIGHT"] * constants["WIDTH"])
    shipped = {one.label for one in linear_maxout.configurations()}
    assert configuration.label in shipped


@pytest.mark.compiles
def test_radeons_get_all_their_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    configuration = next(one for one in kernels.shipped("activation") if one.threads == 128)
    x = torch.ones(1)
    for device, warps in ((MI200, 2), (Device("gfx1100", 32, 65_536), 4)):
        monkeypatch.setattr(launching, "device_of", lambda tensor, device=device: device)
        assert configuration.keywords_for((x,))["num_warps"] == warps


# --- Launches that fail -----------------------------------------------------------------------------------------------


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every launch fails as where the GPU lacks what a kernel needs.  Returns the labels of those that were tried."""
    tried: list[str] = []

    def fail(configuration: kernels.Configuration, programs: int, arguments: tuple[Any, ...]) -> None:
        tried.append(configuration.label)
        error = RuntimeError("Triton Error [CUDA]: too many resources requested for launch")
        raise devices.refuse(arguments[0].get_device(), configuration.label, error)

    monkeypatch.setattr(launching, "recorder", fail)
    return tried


@pytest.mark.kernels
def test_stock_serves_where_a_launch_fails(failing: list[str], device: str) -> None:
    x = torch.randn(2, 3, device=device, requires_grad=True)
    choices: list[Any] = []
    with pytest.warns(RuntimeWarning, match="relu forward .* can't be launched on .*: Triton Error"):  # noqa: SIM117
        with observe_choices(choices.append):
            y = autograd.relu(x)
    assert torch.equal(y, x.relu())
    y.sum().backward()
    assert torch.equal(x.grad, (x > 0).float())
    assert [choice.path for choice in choices] == ["kernel", "stock"]
    assert choices[1].reason.startswith("since relu forward")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(autograd.gelu(x), nn.functional.gelu(x))
    assert len(failing) == 1
    assert "since relu forward" in str(fusednn.explain(fusednn.layers.ReLU(), x))


@pytest.mark.kernels
def test_a_backward_pass_that_cant_be_launched_raises_once(device: str, request: pytest.FixtureRequest) -> None:
    x = torch.randn(2, 3, device=device, requires_grad=True)
    y: Tensor = autograd.relu(x)
    request.getfixturevalue("failing")
    with pytest.warns(RuntimeWarning, match="can't be launched"), pytest.raises(LaunchError):
        y.sum().backward()
    x.grad = None
    autograd.relu(x).sum().backward()  # by stock
    assert torch.equal(x.grad, (x > 0).float())


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (RuntimeError("Triton Error [CUDA]: too many resources requested for launch"), True),
        (RuntimeError("Failed to find C compiler. Please specify via CC environment variable"), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_kernels_stay_errors(error: Exception, lacks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    configuration = next(kernels.shipped("activation"))
    monkeypatch.setattr(type(configuration.kernel), "run", fail)
    arguments = [torch.ones(1) if kind[0] == "*" else 1 for _, kind in configuration.signature]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(LaunchError if lacks else type(error)):
            launching._launch(configuration, 1, *arguments)
    assert bool(device_refusal(-1)) == lacks
