"""`fusednn.recompute`: what is made again is what was not kept, bit for bit, whatever happens in between."""

import contextlib
import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support.operations import OPERATIONS, Operation
from support.recompute import KEPT, assert_same, gradients, made_again, network
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusednn
from fusednn.autograd import handles
from fusednn.autograd.handles import Recipe
from fusednn.autograd.recompute import observe_saved, reason_to_keep
from fusednn.instruments.saved_tensors import saved_tensors
from fusednn.testing import assert_same_bits


@pytest.fixture
def model(device: str) -> nn.Sequential:
    return network(device)


@pytest.fixture
def x(device: str) -> Tensor:
    return torch.randn(3, 4, device=device)


# --- The same bits ----------------------------------------------------------------------------------------------------

#: Of those whose results are kept otherwise, the activations that leave what they are applied to.
MADE_OF_PRODUCTS = {"conv_act_pool2d of sigmoid", "conv_act_pool2d without pooling"}


@pytest.mark.kernels
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_made_again(name: str) -> None:
    """Behind something that keeps the operands, and before something that would keep the result."""
    operation = Operation(name, torch.float32)

    def run(context: Any) -> tuple[list[Tensor], bool]:
        leaves = operation.leaves()
        factors = [torch.full_like(leaf.detach(), 1.5).requires_grad_() for leaf in leaves if leaf.requires_grad]
        saved: list[tuple[int, bool]] = []
        with context(), observe_saved(lambda tensor, again: saved.append((tensor.data_ptr(), again))):
            given = iter(factors)
            operands = [leaf.sin() if leaf.requires_grad else leaf for leaf in leaves]
            kept = [operand * next(given) for operand in operands if operand.requires_grad]
            y = operation.call(operation.ours, operands)
            if not y.requires_grad:
                return [y], False
            weight = torch.full_like(y.detach(), 0.5).requires_grad_()
            loss = (y * weight).sum() + sum(one.sum() for one in kept)
        wanted = [*(leaf for leaf in leaves if leaf.requires_grad), *factors, weight]
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
        return [one for one in found if one is not None], (y.data_ptr(), True) in saved

    expected, _ = run(contextlib.nullcontext)
    found, again = run(fusednn.recompute)
    assert_same(found, expected)
    kept = name.partition(" of ")[0].partition(" without ")[0] in KEPT
    assert again == (not kept or name in MADE_OF_PRODUCTS)


def images() -> nn.Module:
    """Residuals, every kind of activation, pooling and dropout between convolutions."""

    class Block(nn.Module):
        def __init__(self, activation: nn.Module) -> None:
            super().__init__()
            self.conv, self.norm, self.activation = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), activation

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.activation(self.norm(self.conv(x)) + x)
            return y

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)

    first = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.SiLU(), nn.MaxPool2d(2)]
    blocks = [Block(nn.ReLU()), Block(nn.GELU()), Block(nn.ReLU(inplace=True)), Block(nn.Hardswish())]
    return nn.Sequential(*first, *blocks, Dense(), nn.Dropout2d(0.3), nn.Conv2d(3, 2, 1), nn.Flatten(), nn.LeakyReLU())


def words() -> nn.Module:
    layers = [nn.TransformerEncoderLayer(8, 2, 16, 0.1, nn.functional.gelu, batch_first=True, norm_first=True)]
    return nn.Sequential(
        *layers, nn.Linear(8, 12), nn.GELU(), nn.Dropout(0.2), nn.Linear(12, 8), nn.RMSNorm(8), nn.SiLU()
    )


@pytest.mark.parametrize(("build", "shape", "most"), [(images, (2, 1, 9, 9), 0.9), (words, (2, 3, 8), 0.9)])
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "apart"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_networks(
    build: Callable[[], nn.Module], shape: tuple[int, ...], most: float, fuse: bool, training: bool, device: str
) -> None:
    x = torch.randn(shape, device=device)
    kept, found = [], []
    model = build().to(device)
    for again in (False, True):
        ours = copy.deepcopy(model).train(training)
        fusednn.replace_layers(ours, fuse=fuse, recompute=again)
        with saved_tensors() as census:
            torch.manual_seed(1)
            y = ours(x)
        kept.append(census.bytes_beside(x, *ours.parameters(), *ours.buffers()))
        found.append(list(torch.autograd.grad(y.square().sum(), list(ours.parameters()))))
    assert_same(found[1], found[0])
    assert kept[1] < most * kept[0]


@pytest.mark.kernels
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_depth(activation: str, device: str) -> None:
    """Of six residual blocks: every second or third result is kept, or only the first."""
    blocks = [fusednn.layers.BatchNormAct1d(2, activation=activation) for _ in range(6)]
    weights = [torch.full((2, 2), 0.5, device=device, requires_grad=True) for _ in blocks]
    norms = nn.ModuleList(blocks).to(device)
    x = torch.randn(5, 2, device=device)

    def run(context: Any) -> tuple[list[Tensor], int]:
        with saved_tensors() as census, context():
            y = x @ weights[0]
            for norm, weight in zip(norms, weights, strict=True):
                y = norm(y @ weight, residual=y)
        beside = (x, *weights, *norms.parameters())
        return list(torch.autograd.grad(y.square().sum(), weights)), census.bytes_beside(*beside)

    expected, most = run(contextlib.nullcontext)
    sizes = []
    for depth in (0, 1, 9):
        found, size = run(lambda depth=depth: fusednn.recompute(depth=depth))
        assert_same(found, expected)
        sizes.append(size)
    assert most > sizes[0] > sizes[1] > sizes[2]


# --- Changes in place -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", ["result", "operand", "weight"])
def test_changes_are_noticed(changed: str, model: nn.Sequential, x: Tensor) -> None:
    """As PyTorch notices them: what was saved, or what it would be made of, is no longer what it was."""
    operand = model[0](x)
    with fusednn.recompute():
        result = model[1](operand)
        y = model[2](result)
    with torch.no_grad():
        {"result": result, "operand": operand, "weight": model[2].weight}[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("tracked", [True, False])
def test_what_was_changed_before_it_was_saved(tracked: bool, model: nn.Sequential, x: Tensor) -> None:
    def run(context: Any) -> list[Tensor]:
        with context():
            result = model[1](model[0](x))
            with torch.set_grad_enabled(tracked):
                result += 1
            y = model[2](result)
        return list(torch.autograd.grad(y.square().sum(), list(model[:3].parameters())))

    assert_same(run(fusednn.recompute), run(contextlib.nullcontext))


@pytest.mark.kernels
def test_what_was_changed_before_it_was_consumed(device: str) -> None:
    """A ReLU keeps bits: it notes what it was given, not what its neighbour made."""
    norm, relu = fusednn.layers.BatchNorm1d(2).to(device), fusednn.layers.ReLU()
    x = torch.randn(5, 2, device=device)
    weight = torch.ones(2, 2, device=device, requires_grad=True)

    def run(context: Any) -> list[Tensor]:
        with context():
            y = norm(x)
            with torch.no_grad():
                y += 1
            z = relu(y) @ weight
        return list(torch.autograd.grad(z.square().sum(), [weight, *norm.parameters()]))

    assert_same(run(fusednn.recompute), run(contextlib.nullcontext))


# --- Passes over the graph --------------------------------------------------------------------------------------------


def test_is_made_once_and_let_go(model: nn.Sequential, x: Tensor) -> None:
    """Three consumers share one result, which nobody holds afterwards; a second pass makes it again."""
    weights = [torch.ones(8, 2, device=x.device, requires_grad=True) for _ in range(3)]
    with fusednn.recompute():
        result = model[1](model[0](x))
        products = [result @ weight for weight in weights]
        y = torch.stack(products)
    recipe = products[0].grad_fn._raw_saved_self.data  # type: ignore[union-attr]
    assert isinstance(recipe, Recipe)
    del result
    passes = []
    for _ in range(2):
        with made_again() as made:
            passes.append(torch.autograd.grad(y.square().sum(), weights, retain_graph=True))
        assert len(made) == 1
        assert recipe._made is None
    assert_same(list(passes[1]), list(passes[0]))


def test_backward_twice_needs_the_graph(model: nn.Sequential, x: Tensor) -> None:
    with fusednn.recompute():
        y = model(x).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_a_branch_outlives_the_other(model: nn.Sequential, x: Tensor) -> None:
    """Where the node that made a result has let go of its operands, another branch still has the recipe."""
    weights = [torch.ones(8, 2, device=x.device, requires_grad=True) for _ in range(2)]

    def run(context: Any) -> list[Tensor]:
        with context():
            result = model[1](model[0](x))
            one, other = ((result @ weight).square().sum() for weight in weights)
        one.backward(inputs=[weights[0], *model[0].parameters()])
        return [weights[0].grad, *torch.autograd.grad(other, weights[1])]  # type: ignore[list-item]

    found = run(fusednn.recompute)
    weights[0].grad = None
    assert_same(found, run(contextlib.nullcontext))


def test_second_derivatives(model: nn.Sequential, x: Tensor) -> None:
    fusednn.replace_layers(model)

    def run(context: Any) -> list[Tensor]:
        with context():
            y = model(x).square().sum()
        first = torch.autograd.grad(y, list(model.parameters()), create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        return list(torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True))  # type: ignore[arg-type]

    with made_again() as made:
        found = run(fusednn.recompute)
    assert made
    for one, other in zip(found, run(contextlib.nullcontext), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_same_bits(one, other, "of second order")


def test_backward_inside_and_many_steps(model: nn.Sequential, x: Tensor) -> None:
    expected = gradients(model, x)
    with fusednn.recompute(model):
        for _ in range(2):
            assert_same(gradients(model, x), expected)


def test_threads(model: nn.Sequential, x: Tensor) -> None:
    """Each with a pass of its own, and all backward through one graph."""
    expected = gradients(model, x)
    found: list[list[Tensor]] = []
    with fusednn.recompute(model):
        shared = model(x).square().sum()

    def backward() -> None:
        found.append(list(torch.autograd.grad(shared, list(model.parameters()), retain_graph=True)))

    own = lambda: found.append(gradients(model, x, fusednn.recompute))  # noqa: E731
    threads = [threading.Thread(target=target) for target in (own, backward) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    for one in found:
        assert_same(one, expected)


def test_a_region_is_its_thread_s(model: nn.Sequential, x: Tensor) -> None:
    reasons: list[str | None] = []
    with fusednn.recompute():
        thread = threading.Thread(target=lambda: reasons.append(reason_to_keep()))
        thread.start()
        thread.join()
        assert reason_to_keep() == "inside of another recompute"
    assert reasons == [None]


def test_only_shards_lose_their_memory(model: nn.Sequential, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter's memory is asked for, which takes time, where processes share parameters."""
    asked = mock.Mock(return_value=False)
    monkeypatch.setattr("fusednn.autograd.recompute._is_gone", asked)
    for shared in (False, True):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda shared=shared: shared)
        with fusednn.recompute():
            model(x)
        assert asked.called == shared


def test_exceptions_end_it(model: nn.Sequential, x: Tensor) -> None:
    def fails() -> None:
        with fusednn.recompute():
            model(x)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert reason_to_keep() is None
    with saved_tensors() as census:
        model(x)
    assert len(census.tensors) > 0


def test_exceptions_in_the_backward_pass(model: nn.Sequential, x: Tensor) -> None:
    """Between two who share a result: the next pass has the same bits."""
    weights = [torch.ones(8, 2, device=x.device, requires_grad=True) for _ in range(2)]

    def fails(_: Tensor) -> None:
        raise ZeroDivisionError

    with fusednn.recompute():
        result = model[1](model[0](x))
        products = [result @ weight for weight in weights]
    y = torch.stack(products).square().sum()
    handle = weights[0].register_hook(fails)
    with pytest.raises(ZeroDivisionError):
        y.backward(retain_graph=True)
    handle.remove()
    found = list(torch.autograd.grad(y, weights, retain_graph=True))
    assert_same(found, [(result.T @ (2 * product)).detach() for product in products])


def test_streams(model: nn.Sequential, x: Tensor) -> None:
    """Each makes its own result, and the allocator is told that operands are used on another than their own."""
    weights = [torch.ones(8, 2, device=x.device, requires_grad=True) for _ in range(2)]

    def losses() -> list[Tensor]:
        result = model[1](model[0](x))
        return [(result @ weight).square().sum() for weight in weights]

    expected = [torch.autograd.grad(*pair)[0] for pair in zip(losses(), weights, strict=True)]
    current, told = mock.Mock(return_value=1), mock.Mock()
    with (
        mock.patch.object(handles, "stream_of", current),
        mock.patch.object(torch.cuda, "current_stream", current),
        mock.patch.object(Tensor, "record_stream", told),
        made_again() as made,
    ):
        with fusednn.recompute():
            first, second = losses()
        found = list(torch.autograd.grad(first, weights[0]))
        current.return_value = 2
        found += torch.autograd.grad(second, weights[1])
    assert len(made) == 2
    told.assert_called_once_with(2)
    assert_same(found, expected)


# --- Company ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outside", [True, False])
def test_hooks_of_the_user(outside: bool, model: nn.Sequential, x: Tensor) -> None:
    """See every saved tensor, and decide what becomes of it."""

    def run(*contexts: Any) -> tuple[list[Tensor], list[tuple[int, ...]]]:
        shapes: list[tuple[int, ...]] = []

        def pack(tensor: Tensor) -> Tensor:
            shapes.append(tuple(tensor.shape))
            return tensor.detach().double()

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor.float())
        with contextlib.ExitStack() as stack:
            for context in contexts if outside else reversed(contexts):
                stack.enter_context(hooks if context is None else context())
            y = model(x)
        return list(torch.autograd.grad(y.square().sum(), list(model.parameters()))), shapes

    expected, shapes = run(None)
    found, seen = run(None, fusednn.recompute)
    assert_same(found, expected)
    assert seen == shapes


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("outside", [True, False])
def test_checkpoint(outside: bool, reentrant: bool, model: nn.Sequential, x: Tensor) -> None:
    fusednn.replace_layers(model)
    expected = gradients(model, x)
    start = x.clone().requires_grad_()
    if outside:
        with fusednn.recompute(model):
            y = checkpoint(model, start, use_reentrant=reentrant)
    else:
        fusednn.replace_layers(model, recompute=True)
        y = checkpoint(model, start, use_reentrant=reentrant)
    model.zero_grad()
    y.square().sum().backward()
    assert_same([p.grad for p in model.parameters()], expected)  # type: ignore[misc]


def test_offloading(model: nn.Sequential, x: Tensor) -> None:
    expected = gradients(model, x)
    for outer, inner in [
        (torch.autograd.graph.save_on_cpu, fusednn.recompute),
        (fusednn.recompute, torch.autograd.graph.save_on_cpu),
    ]:
        with outer():
            assert_same(gradients(model, x, inner), expected)


def test_partly_frozen(model: nn.Sequential, x: Tensor) -> None:
    fusednn.replace_layers(model)
    for frozen in ([0], [2], [0, 2], [4]):
        for i, layer in enumerate(model):
            layer.requires_grad_(i not in frozen)
        torch.manual_seed(1)

        def run() -> list[Tensor]:
            wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
            return list(torch.autograd.grad(model(x).square().sum(), wanted))

        expected = run()
        with fusednn.recompute(model):
            assert_same(run(), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_done_without_gradients(mode: Any, model: nn.Sequential, x: Tensor) -> None:
    expected = model(x).detach()
    with mode(), fusednn.recompute():
        assert reason_to_keep() == "no gradients are computed"
        assert_same_bits(model(x), expected, "without gradients")


def test_autocast(model: nn.Sequential, x: Tensor) -> None:
    """Also around the backward pass, whose operators must not be cast again."""
    fusednn.replace_layers(model)

    def run(context: Any) -> list[Tensor]:
        with torch.autocast(x.device.type, torch.bfloat16):
            with context():
                y = model(x)
            return list(torch.autograd.grad(y.float().square().sum(), list(model.parameters())))

    with made_again() as made:
        found = run(lambda: fusednn.recompute(model))
    assert len(made) >= 2
    assert_same(found, run(contextlib.nullcontext))


def test_transforms(model: nn.Sequential, x: Tensor) -> None:
    names = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        y: Tensor = torch.func.functional_call(model, parameters, (x,))
        return y.square().sum()

    expected = torch.func.grad(loss)(names)
    fusednn.replace_layers(model, recompute=True)
    assert_same(list(torch.func.grad(loss)(names).values()), list(expected.values()))


@pytest.mark.usefixtures("keeps_kernels")
def test_compiled(model: nn.Sequential, x: Tensor) -> None:
    """The compiler decides; what surrounds compiled code is made again."""
    fusednn.replace_layers(model, recompute=True)
    expected = gradients(model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with made_again() as made:
        assert_same(gradients(compiled, x), expected)  # type: ignore[arg-type]
    assert not made
    assert "the compiler decides" in str(fusednn.explain(compiled, x))  # type: ignore[arg-type]
    model[2] = torch.compile(model[2], backend="aot_eager", fullgraph=True)
    with made_again() as made:
        assert_same(gradients(model, x), expected)
    assert made


# --- Models -----------------------------------------------------------------------------------------------------------


def test_norms_are_told_apart_by_their_models(model: nn.Sequential, x: Tensor) -> None:
    """A LayerNorm's node doesn't know eps; where two have one weight, it is that of neither."""
    for context, norms in ((fusednn.recompute, 0), (lambda: fusednn.recompute(model), 1)):
        with made_again() as made:
            assert_same(gradients(model, x, context), gradients(model, x))
        assert len(made) == 1 + norms
    model.append(nn.LayerNorm(4, eps=0.5)).append(nn.Linear(4, 4).to(x.device))
    model[6].weight, model[6].bias = model[3].weight, model[3].bias
    assert_same(gradients(model, x, lambda: fusednn.recompute(model)), gradients(model, x))


def test_replaced_models_are_copied_and_restored(model: nn.Sequential, x: Tensor) -> None:
    expected = gradients(model, x)
    stock = type(model)
    report = fusednn.replace_layers(model, fuse=True, recompute=True)
    assert report.recompute == "depth 3"
    assert "made again" in str(report)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with made_again() as made:
            torch.testing.assert_close(gradients(one, x), expected)
        assert made
    fusednn.restore_layers(model)
    assert type(model) is stock
    with made_again() as made:
        assert_same(gradients(model, x), expected)
    assert not made


def test_functions_of_others_take_part(x: Tensor) -> None:
    """By a static method; what they saved comes in its order."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
            ctx.save_for_backward(x)
            ctx.factor = factor
            return x.sin() * factor

        @staticmethod
        def recipe(ctx: Any) -> Callable[[Tensor], Tensor]:
            factor = ctx.factor
            return lambda x: x.sin() * factor

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
            (x,) = ctx.saved_tensors
            return g * x.cos() * ctx.factor, None

    start, weight = x.clone().requires_grad_(), torch.ones(4, 4, device=x.device, requires_grad=True)
    with fusednn.recompute():
        y = Scaled.apply(start, 3.0) @ weight
    with made_again() as made:
        found = torch.autograd.grad(y.square().sum(), [start, weight])
    assert len(made) == 1
    assert_same(
        list(found), list(torch.autograd.grad((Scaled.apply(start, 3.0) @ weight).square().sum(), [start, weight]))
    )
