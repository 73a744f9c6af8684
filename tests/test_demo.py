"""``python -m fusednn demo`` and ``examples/digits.py``, in a few steps."""

import argparse
import json
import math
import re
import runpy
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fusednn import kernels
from fusednn.commands import demo
from fusednn.demonstration import training
from fusednn.demonstration.digits import build_network, load_digits
from fusednn.demonstration.picture import FUSED_COLOUR, STOCK_COLOUR, draw
from fusednn.demonstration.report import summary
from fusednn.demonstration.training import Comparison, Contestant, Scale, Training, problems, train_in_turns
from fusednn.layers import Explanation, ExplanationRow, ReplacementReport, replace_layers

STEPS = 6
SMALL = Scale(steps=STEPS, batch_size=4, test_images=8)  # the interpreter's time goes with the images
CPU = torch.device("cpu")


def run_demo(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return demo.run(parser.parse_args(arguments))


@pytest.fixture(scope="module")
def extra() -> None:
    """What the extra ``demo`` installs."""
    for module in ("sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(module)


class Outcome(NamedTuple):
    code: int
    text: str
    folder: Path
    figures: dict[str, Any]


@pytest.fixture(scope="module")
def outcome(extra: None, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One short demo on the CPU, which every test below reads."""
    folder = tmp_path_factory.mktemp("demo") / "made" / "on the way"
    options = ["--device", "cpu", "--steps", str(STEPS), "--kernel-steps", "2", "--output", str(folder), "--verbose"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as text:
        patch.setattr(demo, "INTERPRETED", SMALL)
        code = run_demo(*options)
    return Outcome(code, text.getvalue(), folder, json.loads((folder / "figures.json").read_text()))


def test_agrees(outcome: Outcome) -> None:
    comparison = outcome.figures["comparison"]
    stock, fused = comparison["stock"], comparison["fused"]
    assert outcome.code == 0
    assert outcome.figures["problems"] == []
    assert len(stock["losses"]) == STEPS
    assert len(set(stock["losses"])) == STEPS  # it trains
    assert fused["losses"] == pytest.approx(stock["losses"], rel=training.RELATIVE_TOLERANCE)
    assert 0 < stock["accuracy"] <= 1
    assert min(one[key] for one in (stock, fused) for key in ("cpu_seconds", "wall_seconds", "kept_bytes")) > 0


@pytest.mark.stock
def test_stock_path_is_identical(outcome: Outcome) -> None:
    comparison = outcome.figures["comparison"]
    assert comparison["fused"]["losses"] == comparison["stock"]["losses"]
    assert comparison["fused"]["accuracy"] == comparison["stock"]["accuracy"]
    assert outcome.figures["largest_difference"]["loss"] == 0
    assert "identical, bit for bit" in outcome.text
    assert {row["path"] for row in comparison["explanation"]["rows"]} == {"stock"}


@pytest.mark.skipif(not kernels.AVAILABLE, reason="Triton is not installed")
def test_kernels_ran(outcome: Outcome) -> None:
    """In this process if it runs kernels, else in one that the demo started."""
    figures = outcome.figures if kernels.ON_CPU else outcome.figures["with_kernels"]
    comparison = figures["comparison"]
    assert len(comparison["stock"]["losses"]) == (STEPS if kernels.ON_CPU else 2)
    operations = {row["operation"] for row in comparison["explanation"]["rows"] if row["path"] == "kernel"}
    assert {"batch_norm_act_pool2d", "bias_activation", "cross_entropy"} <= operations
    assert comparison["fused"]["kept_bytes"] < 0.75 * comparison["stock"]["kept_bytes"]


def test_prints_reports(outcome: Outcome) -> None:
    for expected in ("fuse=True", "test accuracy", "kept for the backward pass", "layers replaced", "stock loss"):
        assert expected in outcome.text
    assert ("CPU time a step" in outcome.text) is not kernels.ON_CPU  # of a stand-in for a GPU it would mean nothing
    assert str(outcome.folder / "losses.png") in outcome.text


@pytest.mark.kernels
def test_prints_what_was_fused(outcome: Outcome) -> None:
    assert re.search(r"Conv2d \+ BatchNorm2d \+ ReLU \+ MaxPool2d +batch_norm_act_pool2d +cuDNN", outcome.text)
    assert re.search(r"Flatten +- +no fusednn twin", outcome.text)


def test_one_screen(extra: None) -> None:
    """Without ``--verbose``, for a network as it is: introduction, fused layers, figures, verdict."""
    rows = [ExplanationRow(str(n), "ReLU", "relu", "kernel", "kernel on the GPU") for n in range(9)]
    lines = summary(replace(comparison_of(LOSSES, LOSSES), explanation=Explanation(tuple(rows)))).splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 130


def drawn(path: Path, colour: str) -> Tensor:
    """The columns of a picture in which a colour is."""
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    pixels = torch.from_numpy(imread(path))[..., :3]
    return ((pixels - torch.tensor(to_rgb(colour))).abs().amax(-1) < 0.02).any(0).nonzero()[:, 0] / pixels.shape[1]


@pytest.mark.parametrize("colour", [STOCK_COLOUR, FUSED_COLOUR])
def test_draws_both_curves(outcome: Outcome, colour: str) -> None:
    columns = drawn(outcome.folder / "losses.png", colour)
    assert columns.max() - columns.min() > 0.8  # from the left to the right, which the legend's sample would not be


def test_draws_time_and_memory_of_a_gpu(extra: None, tmp_path: Path) -> None:
    comparison = comparison_of(LOSSES, LOSSES)
    bars = {name: replace(getattr(comparison, name), peak_bytes=2**20) for name in ("stock", "fused")}
    draw(replace(comparison, **bars), tmp_path / "bars.png")
    draw(comparison, tmp_path / "curves.png")
    assert len(drawn(tmp_path / "bars.png", FUSED_COLOUR)) > len(drawn(tmp_path / "curves.png", FUSED_COLOUR))


def test_starts_alike(extra: None) -> None:
    """The network is the stock one, and the same seed gives the same weights and batches."""
    model, again = build_network(3), build_network(3)
    assert all(type(module).__module__.startswith("torch.nn.") for module in model.modules() if module is not model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))

    def losses(model: nn.Module, seed: int) -> list[float]:
        contestant = Contestant(model, torch.optim.SGD(model.parameters(), lr=0.1))
        train_in_turns([contestant], load_digits(CPU), Scale(steps=3, batch_size=16, test_images=1), seed)
        return contestant.losses

    assert losses(model, 3) == losses(again, 3)
    assert losses(build_network(3), 4) != losses(build_network(3), 3)


def wrong_forward(model: nn.Module) -> None:
    model.get_parameter("layers.9.weight").data.add_(0.1)


def wrong_backward(model: nn.Module) -> None:
    hooked: Any = model.get_parameter("layers.3.weight")
    hooked.register_hook(lambda gradient: 1.1 * gradient)


@pytest.mark.parametrize(
    ("sabotage", "step"), [pytest.param(wrong_forward, 1, marks=pytest.mark.thorough), (wrong_backward, 2)]
)
def test_notices_wrong_layers(
    sabotage: Callable[[nn.Module], None],
    step: int,
    extra: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def replace_badly(model: nn.Module, **options: Any) -> ReplacementReport:
        sabotage(model)
        return replace_layers(model, **options)

    monkeypatch.setattr(demo, "INTERPRETED", SMALL)
    monkeypatch.setattr(training, "replace_layers", replace_badly)
    options = ["--device", "cpu", "--steps", "2", "--kernel-steps", "0", "--output", str(tmp_path)]
    assert run_demo(*options) == 1
    problems = json.loads((tmp_path / "figures.json").read_text())["problems"]
    assert problems[0].startswith(f"in step {step} ")
    assert f"The networks disagree: {problems[0]}" in capsys.readouterr().err


def comparison_of(stock: list[float], fused: list[float], accuracy: float = 0.9, path: str = "stock") -> Comparison:
    return Comparison(
        device="cpu",
        seed=0,
        scale=demo.INTERPRETED,
        parameters=0,
        stock=Training(stock, 0.9, 1.0, 1.0, 1, None),
        fused=Training(fused, accuracy, 1.0, 1.0, 1, None),
        replacement=ReplacementReport(),
        explanation=Explanation((ExplanationRow("0", "ReLU", "relu", path, ""),)),
    )


LOSSES = [2.0, 1.5, 1.2, 1.1, 1.0, 0.5, 0.1]


@pytest.mark.parametrize(
    ("comparison", "kernels_expected", "expected"),
    [
        (comparison_of(LOSSES, LOSSES), False, []),
        (comparison_of(LOSSES, [loss * 1.00001 for loss in LOSSES], path="kernel"), True, []),
        (comparison_of(LOSSES, [*LOSSES[:5], 0.6, 0.2], accuracy=0.88), False, []),  # chaos, and as good a network
        (comparison_of(LOSSES, [*LOSSES[:4], 1.001, *LOSSES[5:]]), False, ["in step 5"]),
        (comparison_of([math.nan], [math.nan]), False, ["in step 1"]),
        (comparison_of(LOSSES, LOSSES, accuracy=0.85), False, ["in the end"]),
        (comparison_of(LOSSES, LOSSES), True, ["no layer took a kernel"]),
    ],
)
def test_problems(comparison: Comparison, kernels_expected: bool, expected: list[str]) -> None:
    found = problems(comparison, kernels_expected=kernels_expected)
    assert len(found) == len(expected)
    assert all(problem.startswith(start) for problem, start in zip(found, expected, strict=True))


def test_largest_difference() -> None:
    assert comparison_of([1.0, 2.0, 3.0], [1.0, 2.5, 2.75]).largest_difference == (0.5, 2)
    difference, step = comparison_of([1.0, math.nan, 3.0], [2.0, 2.0, 3.0]).largest_difference
    assert math.isnan(difference)
    assert step == 2


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run_demo("--output", str(tmp_path / "output")) == 2
    message = capsys.readouterr().err
    assert "matplotlib" in message
    assert 'pip install "fusednn[demo]"' in message
    assert not (tmp_path / "output").exists()


def test_json(extra: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "compare", lambda *_: comparison_of(LOSSES, LOSSES, accuracy=0.5, path="kernel"))
    assert run_demo("--device", "cpu", "--kernel-steps", "0", "--output", str(tmp_path), "--json") == 1
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    assert facts == json.loads((tmp_path / "figures.json").read_text())
    assert facts["problems"][0] in printed.err


def test_unusable_device(extra: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_demo("--device", "cuda:99") == 2
    assert "can't use device cuda:99" in capsys.readouterr().err


def test_rejects_no_steps(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_demo("--steps", "0")
    assert "must be at least 1" in capsys.readouterr().err


@pytest.mark.stock
def test_example(extra: None, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "digits.py"))["main"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        accuracy = main(epochs=1)
    finally:
        torch.set_num_threads(threads)
    assert accuracy > 0.5
    assert "CPU tensor" in capsys.readouterr().out  # explain saw the replaced layers
