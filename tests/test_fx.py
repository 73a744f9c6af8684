"""`torch.fx` on replaced models: each layer stays one call, as those of ``torch.nn`` are."""

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fusednn
from fusednn.layers.twin import TWINS, Layer


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.activation = nn.PReLU(4)
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(0.4)
        self.channels = nn.Softmax2d()
        self.head = nn.Linear(64, 3)
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.pool(self.activation(self.norm(self.conv(x))))
        logits = self.head(torch.flatten(self.channels(self.dropout(x)), 1))
        loss: Tensor = self.loss(input=logits, target=target)
        return loss


def calls(traced: fx.GraphModule) -> list[tuple[str, str]]:
    return [(node.op, str(node.target)) for node in traced.graph.nodes]


def test_a_replaced_model_gives_the_same_graph(device: str) -> None:
    network = Network().to(device)
    stock = fx.symbolic_trace(network)
    assert len(fusednn.replace_layers(network).replaced) == 7
    traced = fx.symbolic_trace(network)
    assert calls(traced) == calls(stock)
    assert traced.code == stock.code


def test_a_traced_model_obeys_its_mode(device: str) -> None:
    """What was traced in training has running statistics and dropout that can be switched off."""
    network = Network().to(device)
    fusednn.replace_layers(network)
    traced = fx.symbolic_trace(network).eval()
    x, target = torch.randn(2, 1, 8, 8, device=device), torch.tensor([0, 2], device=device)
    assert torch.equal(traced(x, target), traced(x, target))
    assert torch.equal(traced(x, target), network.eval()(x, target))
    traced.train()
    batches = int(network.norm.num_batches_tracked)
    traced(x, target)
    assert int(network.norm.num_batches_tracked) == batches + 1


def test_every_twin_is_a_leaf() -> None:
    """Also where its forward is inherited from a base that isn't a layer of ours."""
    arguments = {"LogSoftmax": (1,), "Softmax": (1,), "Softmin": (1,), "Threshold": (0.1, 0.2)}
    sizes = {"Conv": (3, 4, 2), "Batc": (3,), "Sync": (3,), "MaxP": (2,), "Line": (4, 5)}
    for stock, twin in TWINS.items():
        built = twin(*arguments.get(stock.__name__, sizes.get(stock.__name__[:4], ())))
        model = nn.Module()
        model.layer = built
        losses = "target" in built.forward.__annotations__
        tracer = fx.Tracer()
        tracer.root, tracer.graph = model, fx.Graph()
        tracer.submodule_paths = {built: "layer"}
        proxies = [tracer.create_proxy("placeholder", name, (), {}) for name in ("x", "target")[: 1 + losses]]
        assert built(*proxies).node.target == "layer", stock


def test_functions_are_traced_as_stock(device: str) -> None:
    def function(x: Tensor) -> Tensor:
        return fusednn.autograd.relu(x)

    traced = fx.symbolic_trace(function)
    x = torch.randn(3, device=device)
    assert torch.equal(traced(x), F.relu(x))


def test_a_subclass_is_a_leaf_too(device: str) -> None:
    class Louder(fusednn.layers.BatchNormAct2d):
        def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
            return 2 * super().forward(input, residual)

    model = nn.Sequential(Louder(4), fusednn.layers.BatchNormAct2d(4)).to(device)
    traced = fx.symbolic_trace(model)
    assert [name for op, name in calls(traced) if op == "call_module"] == ["0", "1"]
    assert all(isinstance(layer, Layer) for layer in traced.children())
    x = torch.randn(2, 4, 3, 3, device=device)
    assert torch.equal(traced.eval()(x), model.eval()(x))
