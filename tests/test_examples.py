"""examples/libraries: each script trains with fusednn as without; skipped where its library isn't installed."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.device import KERNELS_RUN
from support.torchvision import mend_torchvision

from fusednn.autograd.dispatch import observe_choices

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "libraries"
_VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}

#: The libraries of each, and the least that it trains on.
SCRIPTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "kernelize": (("kernels",), {"size": 4, "batch_size": 2}),
    "functions": ((), {"size": 8, "batch_size": 2}),
    "lightning_module": (("pytorch_lightning",), {"size": 8, "batch_size": 2}),
    "timm_efficientnet": (("timm",), {"size": 32, "batch_size": 2}),
    "torchvision_resnet": (("torchvision",), {"size": 32, "batch_size": 2}),
    "transformers_trainer": (("transformers", "accelerate"), {"size": 32, "batch_size": 2, **_VIT}),
}
#: Too many layers for the interpreter, in which other tests train such networks.
LONG = ("timm_efficientnet", "torchvision_resnet")


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[float]]:
    # Our folder of kernels has the name of Hugging Face's package, and stands first where tests are run in its parent.
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry).resolve() != ROOT])
    mend_torchvision()
    for library in SCRIPTS[name][0]:
        pytest.importorskip(library, reason=f"{library} isn't installed")
    main: Callable[..., list[float]] = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    return main


def test_every_script_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SCRIPTS}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.thorough] * (name != "functions")) for name in SCRIPTS]
)
def test_scripts_train_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if KERNELS_RUN and name in LONG:
        pytest.skip("other tests train such networks in the interpreter")
    main, least = script(name, monkeypatch), SCRIPTS[name][1]
    stock = main(False, steps=2, **least)
    chosen: list[str] = []
    with observe_choices(lambda choice: chosen.append(choice.path)):
        ours = main(True, steps=2, **least)
    assert ("kernel" if KERNELS_RUN else "stock") in chosen
    assert len(stock) == len(ours) == 2
    assert stock[0] != stock[1]  # it trains
    assert ours == pytest.approx(stock, rel=1e-4 if KERNELS_RUN else 0)
