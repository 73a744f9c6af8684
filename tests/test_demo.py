"""``python -m fusednn demo`` and ``examples/digits.py``, in a few steps."""

import argparse
import json
import math
import runpy
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from fusednn import kernels
from fusednn.commands import demo
from fusednn.layers import Explanation, ExplanationRow, ReplacementReport, replace_layers

STEPS = 6
SMALL = demo.Scale(steps=STEPS, batch_size=4, test_images=8)  # the interpreter's time goes with the images
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
    options = ["--device", "cpu", "--steps", str(STEPS), "--interpreter-steps", "2", "--output", str(folder)]
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
    assert fused["losses"] == pytest.approx(stock["losses"], rel=demo.RELATIVE_TOLERANCE)
    assert 0 < stock["accuracy"] <= 1
    assert min(training["median_step_seconds"] for training in (stock, fused)) > 0


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
    """In this process if it interprets kernels, else in one that the demo started."""
    comparison = outcome.figures["comparison" if kernels.INTERPRETING else "interpreter"]
    assert len(comparison["stock"]["losses"]) == (STEPS if kernels.INTERPRETING else 2)
    operations = {row["operation"] for row in comparison["explanation"]["rows"] if row["path"] == "kernel"}
    assert {"relu", "prelu", "cross_entropy"} <= operations
    assert ("The losses agree" in outcome.text) is not kernels.INTERPRETING  # the second part's verdict


def test_prints_reports(outcome: Outcome) -> None:
    for expected in ("Device: cpu", "Path: ", "layers replaced", "on kernels", "test accuracy", "median time per step"):
        assert expected in outcome.text
    assert outcome.figures["comparison"]["peak_bytes_are"] in outcome.text
    assert str(outcome.folder / "losses.png") in outcome.text


def test_draws_both_curves(outcome: Outcome) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    pixels = torch.from_numpy(imread(outcome.folder / "losses.png"))[..., :3]
    for colour in (demo.STOCK_COLOUR, demo.FUSED_COLOUR):
        close = (pixels - torch.tensor(to_rgb(colour))).abs().amax(-1) < 0.02
        # Drawn from the left to the right of the picture, which the legend's sample alone would not be.
        columns = close.any(0).nonzero()
        assert columns.max() - columns.min() > 0.8 * pixels.shape[1]


def test_starts_alike(extra: None) -> None:
    """The network is the stock one, and the same seed gives the same weights, batches and masks."""
    model, again = demo.build_network(3), demo.build_network(3)
    assert all(type(module).__module__.startswith("torch.nn.") for module in model.modules() if module is not model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    digits, scale = demo.load_digits(CPU), demo.Scale(steps=3, batch_size=16, test_images=1)
    losses = [demo.train(network, digits, scale, 3, "test").losses for network in (model, again)]
    assert losses[0] == losses[1]
    assert demo.train(demo.build_network(3), digits, scale, 4, "test").losses != losses[0]


def wrong_forward(model: nn.Module) -> None:
    model.get_parameter("layers.5.weight").data.add_(0.1)


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
    monkeypatch.setattr(demo, "replace_layers", replace_badly)
    options = ["--device", "cpu", "--steps", "2", "--interpreter-steps", "0", "--output", str(tmp_path)]
    assert run_demo(*options) == 1
    problems = json.loads((tmp_path / "figures.json").read_text())["problems"]
    assert problems[0].startswith(f"in step {step} ")
    assert f"The networks disagree: {problems[0]}" in capsys.readouterr().err


def comparison_of(
    stock: list[float], fused: list[float], accuracy: float = 0.9, path: str = "stock"
) -> demo.Comparison:
    return demo.Comparison(
        device="cpu",
        seed=0,
        scale=demo.INTERPRETED,
        parameters=0,
        stock=demo.Training(stock, 0.9, 1.0, None),
        fused=demo.Training(fused, accuracy, 1.0, None),
        peak_bytes_are="",
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
def test_problems(comparison: demo.Comparison, kernels_expected: bool, expected: list[str]) -> None:
    found = demo.problems(comparison, kernels_expected=kernels_expected)
    assert len(found) == len(expected)
    assert all(problem.startswith(start) for problem, start in zip(found, expected, strict=True))


def test_largest_difference() -> None:
    assert comparison_of([1.0, 2.0, 3.0], [1.0, 2.5, 2.75]).largest_difference == (0.5, 2)
    difference, step = comparison_of([1.0, math.nan, 3.0], [2.0, 2.0, 3.0]).largest_difference
    assert math.isnan(difference)
    assert step == 2


def test_resident_memory() -> None:
    meter = demo.memory_meter(CPU)
    if not meter.meaning.endswith("during the training"):
        pytest.skip("this system can't reset the peak")
    size = 64 * 2**20
    meter.reset()
    before = meter.read()
    block = torch.ones(size, dtype=torch.uint8)
    peak = meter.read()
    del block
    meter.reset()
    after = meter.read()
    assert before is not None
    assert peak is not None
    assert after is not None
    assert peak > before + 0.9 * size
    assert after < peak - 0.9 * size


def test_memory_without_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise PermissionError

    pytest.importorskip("resource")
    monkeypatch.setattr(demo, "_reset_peak_resident", refuse)
    meter = demo.memory_meter(CPU)
    meter.reset()
    peak = meter.read()
    assert "since it started" in meter.meaning
    assert peak is not None
    assert 50 * 2**20 < peak < 2**40  # bytes: PyTorch alone takes more than the one, no machine has the other


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run_demo("--output", str(tmp_path / "output")) == 2
    message = capsys.readouterr().err
    assert "matplotlib" in message
    assert 'pip install "fusednn[demo]"' in message
    assert not (tmp_path / "output").exists()


def test_json(extra: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "compare", lambda *_: comparison_of(LOSSES, LOSSES, accuracy=0.5, path="kernel"))
    assert run_demo("--device", "cpu", "--interpreter-steps", "0", "--output", str(tmp_path), "--json") == 1
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
