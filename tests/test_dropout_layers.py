"""The dropout layers beside ``torch.nn``'s, and the schedule that anneals them."""

import copy
import io
import pickle

import pytest
import torch
from support.device import FLOAT_DTYPES, KERNELS_RUN
from support.training import losses
from torch import Tensor, nn

import fusednn
from fusednn import layers
from fusednn.layers import AnnealedDropout, BiasActivationDropout, DropConnect
from fusednn.layers.twin import TWINS
from fusednn.testing import random_tensor

CLASSES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
SHAPES = {nn.Dropout1d: (3, 4, 5), nn.Dropout3d: (2, 3, 4, 2, 2)}

every_class = pytest.mark.parametrize("stock_class", CLASSES, ids=lambda cls: cls.__name__)


def sample(stock_class: type[nn.Module], device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return random_tensor(SHAPES.get(stock_class, (2, 3, 4, 5)), dtype, device)


@every_class
def test_twins(stock_class: type[nn.Module]) -> None:
    ours = TWINS[stock_class]
    assert ours is getattr(layers, stock_class.__name__)
    assert issubclass(ours, stock_class)
    assert ours.__init__ is stock_class.__init__
    assert repr(ours(0.25, True)) == repr(stock_class(0.25, True))


@every_class
@pytest.mark.parametrize("p", [-0.1, 1.1])
def test_constructor_errors_are_stocks(stock_class: type[nn.Module], p: float) -> None:
    messages = []
    for cls in (stock_class, TWINS[stock_class]):
        with pytest.raises(ValueError, match="between 0 and 1") as caught:
            cls(p)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@every_class
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(("p", "training"), [(0.5, False), (0.0, True), (1.0, True)])
@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_not_random_is_stocks(
    stock_class: type[nn.Module], dtype: torch.dtype, p: float, training: bool, inplace: bool, device: str
) -> None:
    outcomes = []
    for cls in (stock_class, TWINS[stock_class]):
        x = sample(stock_class, device, dtype).requires_grad_()
        y = cls(p, inplace).train(training)(x * 1)
        outcomes.append((y, *torch.autograd.grad(y.sum(), x)))
    for stock, ours in zip(*outcomes, strict=True):
        assert torch.equal(ours, stock)


@every_class
def test_training_drops(stock_class: type[nn.Module], device: str) -> None:
    layer = TWINS[stock_class](0.5)
    x = torch.ones((64, 16, 2, 2, 2)[: 3 if stock_class is nn.Dropout1d else None], device=device)
    if stock_class is nn.Dropout2d:
        x = x[..., 0]
    torch.manual_seed(0)
    y = layer(x)
    kept = (y > 0).flatten(2)[:, :, 0].double()
    assert abs(kept.mean() - 0.5) < 6 * 0.5 / kept.numel() ** 0.5
    torch.manual_seed(0)
    assert torch.equal(layer(x), y)


@every_class
def test_copies_and_scripting(stock_class: type[nn.Module], device: str) -> None:
    layer = TWINS[stock_class](0.5)
    x = sample(stock_class, device)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    duplicates = (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(saved, weights_only=False))
    torch.manual_seed(1)
    expected = layer(x)
    for duplicate in duplicates:
        assert type(duplicate) is type(layer)
        torch.manual_seed(1)
        assert torch.equal(duplicate(x), expected)
    layer.eval()
    for scripted in (torch.jit.script(layer), torch.jit.trace(layer, x)):
        assert torch.equal(scripted(x), x)


@every_class
def test_func_transforms_take_the_stock_path(stock_class: type[nn.Module], device: str) -> None:
    layer = TWINS[stock_class](0.5)
    x = sample(stock_class, device)
    torch.manual_seed(0)
    gradient = torch.func.grad(lambda x: layer(x).sum())(x)
    torch.manual_seed(0)
    torch.testing.assert_close(gradient, torch.func.grad(lambda x: stock_class(0.5)(x).sum())(x))


def test_autocast_keeps_the_dtype(device: str) -> None:
    x = torch.ones(4, 5, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert layers.Dropout()(x).dtype == nn.Dropout()(x).dtype == torch.float32


class Encoder(nn.Module):
    """A network with dropout of most kinds, as people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Dropout2d(0.1), nn.Flatten(), nn.Linear(288, 16)
        )
        self.attention = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.head = nn.Sequential(nn.SELU(), nn.AlphaDropout(0.05), nn.Dropout(0.2, inplace=True), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(self.features(x).unsqueeze(1)).squeeze(1))


def test_a_replaced_model_trains(device: str) -> None:
    torch.manual_seed(0)
    model = Encoder().to(device)
    expected = model.eval()(torch.ones(2, 1, 8, 8, device=device))
    report = fusednn.replace_layers(model.train())
    assert sum(row.layer in {cls.__name__ for cls in CLASSES} for row in report.replaced) == 6
    model.eval()
    torch.testing.assert_close(model(torch.ones(2, 1, 8, 8, device=device)), expected)
    model.train()

    x, target = torch.randn(24, 1, 8, 8, device=device), torch.arange(24, device=device) % 3
    paths = {row.path for row in fusednn.explain(model, x) if "dropout" in row.operation}
    assert paths == {"kernel" if KERNELS_RUN else "stock"}

    def seeded() -> list[float]:
        torch.manual_seed(1)
        return losses(copy.deepcopy(model), x, target, steps=6, lr=0.1)

    first = seeded()
    assert first[-1] < first[0]
    assert seeded() == first, "the same seed"

    fusednn.restore_layers(model)
    assert not any(isinstance(module, tuple(TWINS[cls] for cls in CLASSES)) for module in model.modules())


# --- Annealing --------------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Dropout(0.5),
        layers.Dropout2d(0.2),
        nn.Linear(4, 4),
        DropConnect(4, 4, p=0.4),
        nn.Sequential(BiasActivationDropout(4, 0.1), layers.AlphaDropout(0.0)),
    )


def probabilities(model: nn.Module) -> list[float]:
    return [module.p for module in model.modules() if hasattr(module, "p")]


def test_annealing_lowers_every_probability() -> None:
    model = network()
    schedule = AnnealedDropout(model, total_epochs=4)
    history = [probabilities(model)]
    for _ in range(6):
        schedule.step()
        history.append(probabilities(model))
    for epoch, values in enumerate(history):
        left = max(0, 1 - epoch / 4)
        assert values == pytest.approx([0.5 * left, 0.2 * left, 0.4 * left, 0.1 * left, 0.0])
    assert history[0] == [0.5, 0.2, 0.4, 0.1, 0.0], "unchanged until the first step, to the bit"
    assert history[-1] == [0.0] * 5, "0 itself: the layers are the identity then"
    assert list(schedule.get_last_p()) == ["0", "1", "3", "4.0", "4.1"]


def test_annealing_to_another_probability() -> None:
    model = nn.Dropout(0.5)
    schedule = AnnealedDropout(model, 2, final_p=0.1)
    schedule.step()
    assert model.p == pytest.approx(0.3)
    schedule.step()
    assert model.p == 0.1


def test_annealing_over_one_epoch() -> None:
    model = nn.Dropout(0.5)
    AnnealedDropout(model, 1, final_p=1.0).step()
    assert model.p == 1.0


def test_annealing_goes_on_from_its_state() -> None:
    model = network()
    schedule = AnnealedDropout(model, 10)
    for _ in range(3):
        schedule.step()
    state = pickle.loads(pickle.dumps(schedule.state_dict()))

    resumed_model = network()
    resumed = AnnealedDropout(resumed_model, 99, final_p=0.5)
    resumed.load_state_dict(state)
    assert probabilities(resumed_model) == probabilities(model)
    for one in (schedule, resumed):
        one.step()
    assert probabilities(resumed_model) == probabilities(model)
    assert resumed.state_dict() == schedule.state_dict()

    by_epoch = network()
    AnnealedDropout(by_epoch, 10, last_epoch=4)
    assert probabilities(by_epoch) == probabilities(model)

    with pytest.raises(KeyError, match="layers"):
        AnnealedDropout(nn.Dropout(), 10).load_state_dict(state)


@pytest.mark.parametrize("arguments", [(0,), (-1,), (5, -0.1), (5, 1.5)])
def test_annealing_refuses_nonsense(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="has to be"):
        AnnealedDropout(nn.Dropout(), *arguments)


def test_annealing_survives_replacing_layers(device: str) -> None:
    """Swapped layers are the same objects; the mask follows the probability of the epoch."""
    model = nn.Sequential(nn.Dropout(0.8)).to(device)
    schedule = AnnealedDropout(model, 4)
    fusednn.replace_layers(model)
    x = torch.ones(2**14, device=device)
    for epoch in range(4):
        p = 0.8 * (1 - epoch / 4)
        dropped = (model(x) == 0).double().mean()
        assert abs(dropped - p) < 6 * (p * (1 - p) / x.numel()) ** 0.5
        schedule.step()
    assert model(x) is x
