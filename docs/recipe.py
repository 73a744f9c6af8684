"""The recipe's ladder on real data: trains it, and writes docs/recipe.json, docs/recipe.md and plots in docs/recipe/.

python docs/recipe.py             train, then write all (minutes)
python docs/recipe.py --render    write the document and the plots again, from docs/recipe.json

Each rung of the ladder adds one improvement to a small network that learns scikit-learn's handwritten digits.  Two
things are computed of each: a whole training with PyTorch's own operators, and the first steps of that training twice
more, with PyTorch's operators and with fusednn's kernels in Triton's interpreter, to see whether they agree.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fusednn
from fusednn.autograd.dispatch import observe_choices
from fusednn.commands.info import environment
from fusednn.commands.kernel_processes import interpreting_processes

FOLDER = Path(__file__).resolve().parent
DATA, DOCUMENT, PLOTS = FOLDER / "recipe.json", FOLDER / "recipe.md", FOLDER / "recipe"

STEPS = 600  # of a whole training
AGREEMENT_STEPS = 20  # in the interpreter, which takes about a second for one
BATCH_SIZE = 64
WIDTH = 32
NOISE = 0.4  # deviation of what the noisy test set adds to pixels between 0 and 1
SEED = 0
EPSILON = float(np.finfo(np.float32).eps)


# --- The ladder -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rung:
    """A network with its loss and its optimizer."""

    name: str
    layers: int = 4
    activation: str = "ReLU"
    cross_entropy: bool = True
    optimizer: str = "Adam"
    batch_norm: bool = False
    dropout: float = 0.0

    @property
    def learning_rate(self) -> float:
        return 0.05 if self.optimizer == "SGD" else 3e-3


LADDER = (
    Rung("squared error", layers=2, activation="Sigmoid", cross_entropy=False, optimizer="SGD"),
    Rung("cross-entropy", layers=2, activation="Sigmoid", optimizer="SGD"),
    Rung("9 layers, sigmoid", layers=9, activation="Sigmoid", optimizer="SGD"),
    Rung("9 layers, ReLU", layers=9, optimizer="SGD"),
    Rung("+ Adam"),
    Rung("+ batch norm", batch_norm=True),
    Rung("+ maxout", batch_norm=True, activation="Maxout"),
    Rung("+ dropout", batch_norm=True, activation="Maxout", dropout=0.2),
)


class StockMaxout(nn.Module):
    """`fusednn.layers.Maxout` without bias, in PyTorch's operators, with the same parameters."""

    def __init__(self, like: fusednn.layers.Maxout) -> None:
        super().__init__()
        self.weight = nn.Parameter(like.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,poi->npo", x, self.weight).amax(1)


class RepeatedDropout(nn.Module):
    """Dropout, in PyTorch's operators, with the masks that another dropout drew."""

    def __init__(self, masks: list[Tensor]) -> None:
        super().__init__()
        self.masks = masks

    def forward(self, x: Tensor) -> Tensor:
        return x * self.masks.pop(0) if self.training else x


def build(rung: Rung) -> nn.Sequential:
    """The same weights each time: stock's layers, but for maxout, which stock doesn't have."""
    torch.manual_seed(SEED)
    layers: list[nn.Module] = []
    features = 64
    for _ in range(rung.layers - 1):
        # Batch norm takes a bias away again: its gradient is nothing but rounding, of which Adam makes whole steps.
        bias = not rung.batch_norm
        if rung.activation == "Maxout":
            layers.append(fusednn.layers.Maxout(features, WIDTH, bias=bias))
        else:
            layers.append(nn.Linear(features, WIDTH, bias=bias))
        if rung.batch_norm:
            layers.append(nn.BatchNorm1d(WIDTH))
        if rung.activation != "Maxout":
            layers.append(getattr(nn, rung.activation)())
        if rung.dropout:
            layers.append(nn.Dropout(rung.dropout))
        features = WIDTH
    layers.append(nn.Linear(features, 10))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            initialise = nn.init.kaiming_normal_ if rung.activation == "ReLU" else nn.init.xavier_normal_
            initialise(layer.weight)
    if not rung.cross_entropy:
        layers.append(nn.Sigmoid())
    return nn.Sequential(*layers)


def as_stock(model: nn.Sequential) -> nn.Sequential:
    """Nothing of fusednn's left in it."""
    return nn.Sequential(*(StockMaxout(one) if isinstance(one, fusednn.layers.Maxout) else one for one in model))


# --- Training ---------------------------------------------------------------------------------------------------------


def load_data() -> tuple[Tensor, ...]:
    """Images (N, 64) in [0, 1] and labels to train on; test images, the same with noise, and their labels."""
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32) / 16
    train, test, train_labels, test_labels = train_test_split(
        images, labels, test_size=360, stratify=labels, random_state=SEED
    )
    noisy = test + np.random.default_rng(SEED).normal(0, NOISE, test.shape).astype(np.float32)
    return tuple(torch.from_numpy(array) for array in (train, train_labels, test, noisy, test_labels))


def optimizer_of(rung: Rung, model: nn.Module, module: ModuleType) -> Any:
    """Of PyTorch's, or ours."""
    momentum = {"momentum": 0.9} if rung.optimizer == "SGD" else {}
    return getattr(module, rung.optimizer)(model.parameters(), lr=rung.learning_rate, **momentum)


def train(rung: Rung, model: nn.Module, loss_function: nn.Module, optimizer: Any, steps: int) -> list[float]:
    """The loss of each step."""
    images, labels, *_ = load_data()
    batches = torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)
    model.train()
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(labels), (BATCH_SIZE,), generator=batches)
        targets = labels[rows] if rung.cross_entropy else nn.functional.one_hot(labels[rows], 10).float()
        loss = loss_function(model(images[rows]), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def loss_of(rung: Rung) -> nn.Module:
    return nn.CrossEntropyLoss() if rung.cross_entropy else nn.MSELoss()


@torch.no_grad()
def accuracies(model: nn.Module) -> tuple[float, float]:
    """On the test set, and on the noisy test set."""
    *_, clean, noisy, labels = load_data()
    model.eval()
    return tuple((model(images).argmax(1) == labels).double().mean().item() for images in (clean, noisy))


def train_stock(rung: Rung, steps: int = STEPS) -> dict[str, Any]:
    """A whole training with PyTorch's own operators."""
    torch.set_num_threads(1)
    model = as_stock(build(rung))
    losses = train(rung, model, loss_of(rung), optimizer_of(rung, model, torch.optim), steps)
    clean, noisy = accuracies(model)
    return {"losses": losses, "accuracy": clean, "noisy_accuracy": noisy}


def compare(rung: Rung, steps: int = AGREEMENT_STEPS) -> dict[str, Any]:
    """The first steps, with kernels and with PyTorch's operators; to run where kernels are interpreted.

    Dropout kernels draw other masks than PyTorch does for the same seed.  So the stock network is given those that the
    kernels draw: what is compared is what the networks compute, not how masks are drawn.
    """
    torch.set_num_threads(1)
    model = build(rung)
    loss_function = loss_of(rung)
    fusednn.replace_layers(model)
    fusednn.replace_layers(loss_function)
    masks: list[list[Tensor]] = []
    for layer in model:
        if isinstance(layer, nn.Dropout):
            masks.append([])
            layer.register_forward_pre_hook(record_masks(masks[-1]))
    taken: set[tuple[str, bool]] = set()
    with observe_choices(lambda choice: taken.add((choice.operation, choice.kernel))):
        optimizer = optimizer_of(rung, model, fusednn.optim)
        ours = train(rung, model, loss_function, optimizer, steps)
    assert all(path.kernel for path in fusednn.optim.explain(optimizer))

    stock = as_stock(build(rung))
    replayed = iter(masks)
    stock = nn.Sequential(*(RepeatedDropout(next(replayed)) if isinstance(one, nn.Dropout) else one for one in stock))
    return {
        "stock": train(rung, stock, loss_of(rung), optimizer_of(rung, stock, torch.optim), steps),
        "fusednn": ours,
        "kernels": sorted(operation for operation, kernel in taken if kernel),
        "stock operators": sorted(operation for operation, kernel in taken if not kernel),
    }


def record_masks(masks: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor]], None]:
    """A hook that finds the mask of the coming call by the same call on ones, and turns the generator back."""

    def record(dropout: nn.Module, operands: tuple[Tensor]) -> None:
        if dropout.training:
            state = torch.get_rng_state()
            masks.append(type(dropout).forward(dropout, torch.ones_like(operands[0])).detach())
            torch.set_rng_state(state)

    return record


def measure() -> dict[str, Any]:
    """All the data that the document is made of."""
    with interpreting_processes(2) as processes:
        compared = [processes.submit(compare, rung) for rung in LADDER]
        trained = [train_stock(rung) for rung in LADDER]
        return {
            "environment": environment() | {"commit": _commit(), "date": datetime.now(timezone.utc).date().isoformat()},
            "settings": {
                "steps": STEPS,
                "agreement_steps": AGREEMENT_STEPS,
                "batch_size": BATCH_SIZE,
                "width": WIDTH,
                "noise": NOISE,
                "seed": SEED,
            },
            "rungs": [
                {"rung": asdict(rung), "training": training, "agreement": comparison.result()}
                for rung, training, comparison in zip(LADDER, trained, compared, strict=True)
            ],
        }


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=True).stdout.strip()


# --- The document -----------------------------------------------------------------------------------------------------


def differences(rung: dict[str, Any]) -> list[float]:
    """Of each step's two losses, relative."""
    pairs = zip(rung["agreement"]["stock"], rung["agreement"]["fusednn"], strict=True)
    return [abs(ours - stock) / abs(stock) for stock, ours in pairs]


def document(data: dict[str, Any]) -> str:
    """docs/recipe.md."""
    settings, where, rungs = data["settings"], data["environment"], data["rungs"]
    steps, first = settings["steps"], settings["agreement_steps"]
    rows = []
    for rung in rungs:
        relative, training = differences(rung), rung["training"]
        rows.append(
            f"| {rung['rung']['name']} | {training['losses'][-1]:.4f} | {training['accuracy']:.1%} "
            f"| {training['noisy_accuracy']:.1%} | {max(relative[:5]):.1e} | {max(relative):.1e} "
            f"| {', '.join(rung['agreement']['kernels'])} |"
        )
    table = "\n".join(rows)
    early, late = (max(max(differences(rung)[:count]) for rung in rungs) for count in (5, first))
    return f"""# The recipe, step by step

<!-- Written by docs/recipe.py from docs/recipe.json: change those.  `make recipe` trains again. -->

How a network of sigmoids trained on squared errors becomes one that trains well, one improvement at a time: and at each
step, whether fusednn's kernels give the losses that PyTorch's operators give.

The data are scikit-learn's handwritten digits: 1437 images of 8 x 8 pixels to train on, 360 to test on, and those 360
again with noise of deviation {settings["noise"]:g} added to pixels between 0 and 1. The networks are fully connected
and {settings["width"]} features wide; the first two have 2 layers, the next two 9, all others 4. SGD has a learning
rate of 0.05 and momentum 0.9, Adam one of 0.003; batches hold {settings["batch_size"]} images, and the seed is
{settings["seed"]}. From "+ Adam" on, each rung keeps what those before it added, but maxout takes the place of ReLU.

| rung | last loss | test accuracy | with noise | difference in 5 steps | in {first} steps | on kernels |
|---|---|---|---|---|---|---|
{table}

**What computed what.** Loss and accuracies are of a whole training of {steps} steps, by PyTorch's own operators on a
CPU. There fusednn would take the same operators, and agree with itself. So the first {first} steps of each training
were computed twice more: by PyTorch's operators, and by fusednn's layers, loss and optimizer, with their kernels in
Triton's interpreter. The last column lists what took kernels, beside the optimizer, which always did; all other matrix
products are PyTorch's in both. The differences are between those two loss curves: relative, the largest of the first 5
and of all {first} steps.

![Loss curves of both networks](recipe/agreement.png)

**What it shows.** The curves differ by {early:.1e} at most in the first 5 steps, and by {late:.1e} in {first}, where
float32 rounds by {EPSILON:.1e}. In longer trainings the difference grows, since training amplifies rounding. How fast
depends on the network: where a layer before a batch norm has a bias, its gradient is zero but for rounding, and Adam,
which divides gradients by their size, makes whole steps of it. So these layers have no bias here.

![Their relative difference](recipe/differences.png)

**What it doesn't.** No GPU took part, so nothing here is about speed. The networks are small, since the interpreter is
slow, and one seed tells little about which rung is better: two seeds easily differ by a point in accuracy.

![Whole trainings, with PyTorch's operators](recipe/training.png)

**Dropout** draws other masks than PyTorch for the same seed. For the comparison, the stock network was given the masks
that fusednn's kernels drew, so that the curves can be compared number by number; its whole training drew its own.

**The text** of 20 classes that such recipes are often shown on isn't here: no package that ships it was found.

{where["platform"]}, Python {where["python"]}, torch {where["torch"]}, triton {where["triton"]}; commit
{where["commit"]}, {where["date"]}.
"""


def draw(data: dict[str, Any]) -> None:
    """The plots, each marked with a digest of the data."""
    from matplotlib.figure import Figure

    rungs = data["rungs"]
    names = [rung["rung"]["name"] for rung in rungs]

    figure = Figure(figsize=(10, 4.6), dpi=80, layout="constrained")
    for axes, name, rung in zip(figure.subplots(2, 4).flat, names, rungs, strict=True):
        steps = range(1, len(rung["agreement"]["stock"]) + 1)
        axes.plot(steps, rung["agreement"]["stock"], color="#f8c48a", linewidth=4, label="PyTorch")
        axes.plot(steps, rung["agreement"]["fusednn"], color="#1f3a5f", linewidth=1, label="fusednn's kernels")
        axes.set_title(name, fontsize=9, loc="left")
        axes.tick_params(labelsize=7)
    figure.axes[0].legend(frameon=False, fontsize=7)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("loss", fontsize=9)
    _save(figure, "agreement", data)

    for plot, label, curves in (
        ("differences", "relative difference of the losses", [differences(rung) for rung in rungs]),
        ("training", "loss, mean of 20 steps", [_smooth(rung["training"]["losses"]) for rung in rungs]),
    ):
        figure = Figure(figsize=(8, 4.4), dpi=80, layout="constrained")
        axes = figure.subplots()
        for name, curve in zip(names, curves, strict=True):
            axes.plot(range(1, len(curve) + 1), [max(value, 1e-9) for value in curve], linewidth=1.2, label=name)
        if plot == "differences":
            axes.axhline(EPSILON, color="#888888", linestyle="--", linewidth=0.8, label="float32's rounding")
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.legend(frameon=False, fontsize=7, ncols=2)
        _save(figure, plot, data)


def _smooth(losses: list[float]) -> list[float]:
    return [float(np.mean(losses[max(0, step - 19) : step + 1])) for step in range(len(losses))]


def _save(figure: Any, name: str, data: dict[str, Any]) -> None:
    PLOTS.mkdir(exist_ok=True)
    figure.savefig(PLOTS / f"{name}.png", metadata={"Description": digest(data), "Software": None})


def digest(data: dict[str, Any]) -> str:
    """Of the data that a plot shows."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def main() -> None:
    if "--render" not in sys.argv[1:]:
        DATA.write_text(json.dumps(measure(), indent=1) + "\n")
    data = json.loads(DATA.read_text())
    DOCUMENT.write_text(document(data))
    draw(data)


if __name__ == "__main__":
    main()
