"""Compiled training steps of replaced and fused models, as Inductor would launch them: never more than stock's."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from support import baseline  # noqa: F401 (makes the benchmarks importable)
from support.neighbourhoods import NETWORKS
from support.torchvision import mend_torchvision
from torch import nn

import fusednn

from fusednn_bench.compiled_steps import CONTESTANTS, CompiledStep, compiled_steps  # isort: skip
from fusednn_bench.inductor import count_step  # isort: skip
from fusednn_bench.documents import committed_results  # isort: skip
from fusednn_bench.tables import by_contestant  # isort: skip

pytestmark = pytest.mark.compiles
mend_torchvision()  # which transformers imports
STEPS = {step.id: step for step in compiled_steps()}

#: Each step takes seconds.
CHEAP = ("MLP with dropout bf16 512x512",)


@pytest.mark.parametrize(
    "step",
    [pytest.param(step, marks=[pytest.mark.thorough] * (name not in CHEAP), id=name) for name, step in STEPS.items()],
)
def test_never_more_than_stock(step: CompiledStep) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock, *ours = (step.count(contestant) for contestant in CONTESTANTS)
    for counts in ours:
        assert counts.launched() <= stock.launched()
        assert counts.bytes() <= stock.bytes()


def test_committed_steps_are_never_more_than_stocks() -> None:
    """Every network in every size and dtype, by the file that the documents show."""
    (path,) = (path for path in committed_results(Path(__file__).parents[1]) if path.name == "inductor.json")
    steps = by_contestant(json.loads(path.read_text())["cases"])
    assert len(steps) >= 30
    for key, records in steps.items():
        for contestant in ("replaced", "fused"):
            for measure in ("launches", "bytes"):
                assert records[contestant][measure] <= records["stock"][measure], (key, contestant, measure)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.thorough] * (name != "DCGAN's discriminator")) for name in NETWORKS],
)
def test_neighbours_are_never_more_than_stocks(name: str) -> None:
    counts = []
    for fuse in (False, True):
        model = NETWORKS[name].build()
        if fuse:
            fusednn.replace_layers(model, fuse=True)
        counts.append(count_step(model, [torch.empty(NETWORKS[name].shape, device="meta", requires_grad=True)]))
    stock, ours = counts
    assert ours.launched() <= stock.launched()
    assert ours.bytes() <= stock.bytes()


def test_gradients_of_biases_are_sums() -> None:
    """Inductor's own, as on a GPU, whose library would make them beside the convolution's gradients on a CPU."""
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU())
    counts = count_step(model, [torch.empty(1, 2, 128, 128, device="meta")])
    sums = [launch for launch in counts.launches if "aten.sum" in launch.name]
    assert [launch.maker for launch in sums] == ["inductor"] * 2, "a pass over the gradient, and one over its parts"


@pytest.mark.parametrize(
    "mode", ["default", "reduce-overhead", pytest.param("max-autotune", marks=pytest.mark.thorough)]
)
def test_fused_steps_launch_our_kernels(mode: str) -> None:
    """What is counted is what it is said to be, in every mode of the compiler."""
    counts = STEPS["MLP with dropout fp32 512x512"].count("fused", mode)
    ours = [launch for launch in counts.launches if launch.maker == "fusednn"]
    kernels = ["bias_activation_dropout_forward_kernel"] * 2 + ["bias_activation_dropout_backward_kernel"] * 2
    assert [launch.name for launch in ours] == kernels
    # The product and the result, a bit an element, and the seed.
    assert ours[0].bytes == 512 * 512 * (4 + 4) + 512 * 512 // 8 + 8
    assert bool(counts.refusals) == (mode == "default"), "CUDA graphs take all of it"


@pytest.mark.parametrize("name", ["ResNet block fp32 8x64x56x56", "MLP with dropout fp32 512x512"])
def test_networks_that_miss_their_goals_lack_no_chain(name: str) -> None:
    """Dynamo's graph would show none that isn't found in the modules' code: all but the last product are in one."""
    rows = fusednn.replace_layers(STEPS[name].build(), fuse=True).rows
    assert {row.names for row in rows if not row.reason.startswith("fused")} <= {("6",)}


@pytest.mark.thorough
def test_chains_that_only_dynamos_graph_shows_are_the_compilers() -> None:
    """Those of MobileNetV2 in transformers, whose code can't be traced, in a module whose code can."""

    def build() -> nn.Module:
        sizes = (32, 192, 1), (192, 192, 3), (192, 32, 1)
        convs = (nn.Conv2d(*size, padding="same", groups=192 if size[2] == 3 else 1, bias=False) for size in sizes)
        expand, depthwise, reduce = ((conv, nn.BatchNorm2d(conv.out_channels)) for conv in convs)
        return nn.Sequential(*expand, nn.ReLU6(), *depthwise, nn.ReLU6(), *reduce)

    step = CompiledStep("inverted residual", build, (8, 32, 56, 56), torch.float32)
    report = fusednn.replace_layers(build(), fuse=True)
    assert {"fused with 1, 2", "fused with 4, 5"} <= {row.reason for row in report.rows}
    fused, stock = (step.count(contestant).record() for contestant in ("fused", "stock"))
    assert fused == stock
    assert (stock["launches"], stock["bytes"] // 10**6) == (40, 825), "as docs/compile.md has it"


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in STEPS if " fp32 " in name])
def test_cuda_graphs_take_fused_steps(name: str) -> None:
    assert STEPS[name].count("fused", "max-autotune").refusals == ()
