"""A whole network in the company of PyTorch's tools: its training is compared with that of the stock network."""

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.gpu import capture
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from torch.utils.checkpoint import checkpoint

import fusednn
from fusednn import optim
from fusednn.testing import random_tensor

Loss = Callable[[Tensor, Tensor], Tensor]


class Network(nn.Module):
    """Layers of several families, whose calls tracers have to follow: logits of images, or given labels their loss."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.PReLU(4), nn.MaxPool2d(2)
        )
        self.head = nn.Sequential(nn.Linear(16, 12), nn.ReLU(inplace=True), nn.Dropout(dropout), nn.Linear(12, 5))
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = self.head(self.features(images).flatten(1))
        return logits if labels is None else self.loss(logits, labels)


def networks(device: str, dropout: float = 0.0) -> tuple[Network, Network]:
    """A stock network, and its replaced twin."""
    torch.manual_seed(1)
    stock = Network(dropout).to(device)
    replaced = copy.deepcopy(stock)
    assert len(fusednn.replace_layers(replaced).replaced) == 7
    return stock, replaced


def batches(device: str, steps: int = 2) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(steps):
        yield random_tensor((6, 1, 4, 4), torch.float32, device, step), torch.arange(6, device=device) * (step + 1) % 5


def sgd(model: nn.Module, module: ModuleType) -> torch.optim.Optimizer:
    """Not Adam: where a gradient is nothing but rounding, as before a batch norm, that would make steps of it."""
    return module.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(loss_of: Loss, optimizer: torch.optim.Optimizer, device: str, steps: int = 2) -> list[float]:
    """The loss of each step."""
    history = []
    for images, labels in batches(device, steps):
        loss = loss_of(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


def assert_same_training(ours: Loss, model: nn.Module, stock: nn.Module, device: str) -> None:
    """Losses and what they leave behind, when ``model`` is trained through ``ours``."""
    expected = train(stock, sgd(stock, torch.optim), device)
    assert train(ours, sgd(model, optim), device) == pytest.approx(expected, rel=1e-5)
    for mine, theirs in zip(model.state_dict().values(), stock.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


# --- torch.compile ----------------------------------------------------------------------------------------------------

BACKENDS = ["eager", "aot_eager", pytest.param("aot_eager_decomp_partition", marks=pytest.mark.thorough)]


@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiled_training(backend: str, device: str) -> None:
    torch._dynamo.reset()
    stock, replaced = networks(device)
    assert_same_training(torch.compile(replaced, fullgraph=True, backend=backend), replaced, stock, device)


def test_compiled_optimizer_step(device: str) -> None:
    """The step breaks a graph that it is in, as stock's does."""
    torch._dynamo.reset()
    stock, replaced = networks(device)
    optimizer = sgd(replaced, optim)
    compiled = torch.compile(lambda: optimizer.step(), backend="aot_eager")
    for images, labels in batches(device):
        replaced(images, labels).backward()
        compiled()
        optimizer.zero_grad()
    train(stock, sgd(stock, torch.optim), device)
    torch.testing.assert_close(list(replaced.parameters()), list(stock.parameters()), rtol=1e-4, atol=1e-5)


# --- Mixed precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.thorough)], ids=str)
def test_autocast_and_grad_scaler(dtype: torch.dtype, device: str) -> None:
    """With a step whose gradients overflow: it is skipped."""
    outcomes = []
    for model, module in zip(networks(device), (torch.optim, optim), strict=True):
        optimizer = sgd(model, module)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=2)
        history = []
        for step, (images, labels) in enumerate(batches(device, 4)):
            with torch.autocast(device, dtype=dtype):
                loss = model(images, labels)
            optimizer.zero_grad()
            scaler.scale(loss * (float("inf") if step == 1 else 1.0)).backward()
            before = [parameter.detach().clone() for parameter in model.parameters()]
            scaler.step(optimizer)
            scaler.update()
            moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
            assert any(moved) is (step != 1)
            history += [loss.item(), scaler.get_scale()]
        outcomes.append(history)
    assert outcomes[0][-1] == 2.0**10  # halved, and doubled after two steps
    assert outcomes[1] == pytest.approx(outcomes[0], rel=8 * torch.finfo(dtype).eps)


# --- Checkpoints and offloading ---------------------------------------------------------------------------------------


def gradients(model: nn.Module, loss_of: Loss, device: str) -> list[Tensor]:
    """Loss, gradient of the images, and of the parameters."""
    images, labels = next(batches(device))
    images.requires_grad_()
    model.zero_grad()
    torch.manual_seed(3)
    loss = loss_of(images, labels)
    loss.backward()
    return [loss.detach(), images.grad, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_keeps_the_masks(use_reentrant: bool, device: str) -> None:
    _, model = networks(device, dropout=0.5)
    plain = gradients(model, model, device)
    again = gradients(model, lambda x, t: checkpoint(model, x, t, use_reentrant=use_reentrant), device)
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


def test_activations_are_offloaded(device: str) -> None:
    _, model = networks(device, dropout=0.5)
    packed = []

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        packed.append(tensor)
        return tensor.device, tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)

    def offloaded(images: Tensor, labels: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept[1].to(kept[0])):
            return model(images, labels)

    def on_cpu(images: Tensor, labels: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return model(images, labels)

    plain = gradients(model, model, device)
    for loss_of in (offloaded, on_cpu):
        torch.testing.assert_close(gradients(model, loss_of, device), plain, rtol=0, atol=0)
    assert len(packed) > 7


# --- torch.export and torch.func --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool, device: str) -> None:
    """With a batch of any size; the program can be saved and loaded."""
    stock, replaced = (model.eval() for model in networks(device))
    (images, _), (others, _) = batches(device)
    shapes = {"images": {0: torch.export.Dim("batch", min=2, max=64)}}
    program = torch.export.export(replaced, (images,), dynamic_shapes=shapes, strict=strict)
    assert set(program.state_dict) == set(stock.state_dict())
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    for exported in (program, torch.export.load(saved)):
        torch.testing.assert_close(exported.module()(images), stock(images))
        torch.testing.assert_close(exported.module()(others[:3]), stock(others[:3]))


def test_func_transforms(device: str) -> None:
    """The gradients of each sample, and a directional derivative."""
    images, labels = next(batches(device))
    images = images.double()
    outcomes = []
    for model in networks(device):
        model.eval().double()

        def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor, model: nn.Module = model) -> Tensor:
            return functional_call(model, parameters, (image[None], label[None]))

        of_each = torch.vmap(grad(loss), in_dims=(None, 0, 0))(dict(model.named_parameters()), images, labels)
        outcomes.append((of_each, jvp(model, (images,), (torch.ones_like(images),))))
    torch.testing.assert_close(*outcomes)


# --- Saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours_first", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_a_training_goes_on_elsewhere(ours_first: bool, tmp_path: Path, device: str) -> None:
    """From a checkpoint that is read with ``weights_only``: half of it is ours, half stock's."""
    whole, _ = networks(device)
    optimizer = sgd(whole, torch.optim)
    expected = train(whole, optimizer, device) + train(whole, optimizer, device)

    pairs = [(model, sgd(model, module)) for model, module in zip(networks(device), (torch.optim, optim), strict=True)]
    (model, optimizer), (other, its_optimizer) = reversed(pairs) if ours_first else pairs
    history = train(model, optimizer, device)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "checkpoint.pt")
    weights, state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    other.load_state_dict(weights)
    its_optimizer.load_state_dict(state)
    history += train(other, its_optimizer, device)
    assert history == pytest.approx(expected, rel=1e-4)


def test_whole_networks_are_saved(tmp_path: Path, device: str) -> None:
    _, replaced = networks(device)
    torch.save(replaced, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    images, _ = next(batches(device))
    torch.testing.assert_close(loaded(images), replaced(images), rtol=0, atol=0)
    fusednn.restore_layers(loaded)
    assert type(loaded.features[3]) is nn.MaxPool2d


def test_state_by_parameter_names(device: str) -> None:
    """As ``torch.distributed.checkpoint`` keeps an optimizer's: from ours to stock."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    stock, replaced = networks(device)
    theirs, ours = sgd(stock, torch.optim), sgd(replaced, optim)
    train(replaced, ours, device)
    model_state, optimizer_state = copy.deepcopy(get_state_dict(replaced, ours))
    set_state_dict(stock, theirs, model_state_dict=model_state, optim_state_dict=optimizer_state)
    assert train(replaced, ours, device) == pytest.approx(train(stock, theirs, device), rel=1e-5)


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_captured_training_step(name: str, device: str) -> None:
    """Forward, backward and update in one graph, replayed over new batches: bit for bit what eager steps give."""
    outcomes = []
    for captured in (False, True):
        _, model = networks(device)
        capturable = {"capturable": True} if name == "AdamW" else {}
        optimizer = getattr(optim, name)(model.parameters(), lr=0.01, **capturable)
        images, labels = next(batches(device))

        def step(
            model: nn.Module = model,
            optimizer: torch.optim.Optimizer = optimizer,
            images: Tensor = images,
            labels: Tensor = labels,
        ) -> Tensor:
            optimizer.zero_grad(set_to_none=False)
            loss = model(images, labels)
            loss.backward()
            optimizer.step()
            return loss.detach()

        if captured:
            graph, loss = capture(step)
        else:
            for _ in range(3):
                step()
        history = []
        for new_images, new_labels in batches(device, 5):
            images.copy_(new_images)
            labels.copy_(new_labels)
            if captured:
                graph.replay()
            else:
                loss = step()
            history.append(loss.item())
        outcomes.append((history, list(model.parameters())))
    torch.testing.assert_close(*outcomes, rtol=0, atol=0)
