"""Faults of kinds that once passed the tests, in lines of today: ``make mutants PLANTED=1`` puts them in again."""

from pathlib import Path
from typing import NamedTuple

from .mutators import Mutant

__all__ = ["PLANTED", "Planted"]


class Planted(NamedTuple):
    """A fault, as the text that it replaces, which stands once in its file."""

    name: str
    path: str
    right: str
    wrong: str

    def mutant(self, root: Path) -> Mutant:
        source = (root / self.path).read_text(encoding="utf-8")
        before, found, after = source.partition(self.right)
        if not found or self.right in after:
            raise ValueError(f"{self.path} has not one {self.right!r}: {self.name}")
        line = before.count("\n") + 1
        return Mutant(self.path, line, f"planted: {self.name}", self.right, self.wrong, len(before.encode()))


PLANTED = [
    # --- First gradients with a graph ---
    Planted(
        "the sign of softmin's gradient with a graph",
        "autograd/softmax.py",
        'dx = -dx if kind == "softmin" else dx',
        'dx = dx if kind == "softmin" else dx',
    ),
    Planted(
        "cross-entropy's gradient with a graph forgets ignore_index",
        "autograd/cross_entropy.py",
        "weight, ignore_index=ignore_index, reduction",
        "weight, reduction",
    ),
    Planted(
        "the second derivative of channels-last pooling takes the maxima for contiguous",
        "autograd/pool.py",
        "indices = winner_indices(code, shape, size, channels_last, window, masked=masked)",
        "indices = winner_indices(code, shape, size, False, window, masked=masked)",
    ),
    Planted(
        "the second derivative behind a convolution's bias takes none for one",
        "autograd/batch_norm_pool.py",
        "elif bias is not None:",
        "elif bias is None:",
    ),
    # --- Gradients of some operands ---
    Planted(
        "a norm's gradients are left to the input's where the residual requires one",
        "autograd/conv_batch_norm.py",
        "merges = needed[0] and weight is not None",
        "merges = needed[1] and weight is not None",
    ),
    # --- Choices ---
    Planted("the last of equal pieces wins", "kernels/maxout.py", "return (value > best)", "return (value >= best)"),
    Planted(
        "the gradient of a bias of maxout isn't written",
        "kernels/linear_maxout.py",
        "tl.store(db_pointer + unit_row[None, :], db, mask=(unit < units)[None, :])",
        "tl.store(db_pointer + unit_row[None, :], db, mask=(unit < 0)[None, :])",
    ),
    # --- Memory ---
    Planted(
        "targets are read beyond their end",
        "kernels/nll_loss.py",
        "tl.load(t_pointer + start + offsets, mask=inside, other=0)",
        "tl.load(t_pointer + start + offsets)",
    ),
    Planted(
        "biases of units that don't exist are read",
        "kernels/linear_maxout.py",
        "tl.load(b_pointer + unit, mask=unit < units, other=0)",
        "tl.load(b_pointer + unit)",
    ),
    Planted(
        "new_empty where zeros are meant",
        "kernels/nll_loss.py",
        "else x.new_zeros(x.shape)",
        "else x.new_empty(x.shape)",
    ),
    Planted(
        "a ReLU in place changes nothing in memory with gaps",
        "autograd/activation.py",
        "input._is_view() or not is_dense(input)",
        "input._is_view()",
    ),
    Planted(
        "a contiguous image of one channel gives a result that is channels last",
        "kernels/conv.py",
        "memory_format=torch.channels_last) and not x.is_contiguous()",
        "memory_format=torch.channels_last)",
    ),
    Planted(
        "statistics of an empty batch",
        "kernels/batch_norm_statistics.py",
        "    if not x.numel():\n        return torch.zeros((1, 3, x.shape[1])",
        "    if x.dim() > 5:\n        return torch.zeros((1, 3, x.shape[1])",
    ),
    # --- Hooks and classes, after fusing ---
    Planted(
        "hooks on the linear layer of a maxout chain",
        "layers/fusion/patterns/maxout.py",
        "layer_refusal(linear, nn.Linear) or layer_refusal(pool, nn.MaxPool1d)",
        "layer_refusal(pool, nn.MaxPool1d)",
    ),
    Planted(
        "hooks on the pooling of a maxout chain",
        "layers/fusion/patterns/maxout.py",
        "layer_refusal(linear, nn.Linear) or layer_refusal(pool, nn.MaxPool1d)",
        "layer_refusal(linear, nn.Linear)",
    ),
    Planted(
        "hooks on the linear layer before a view",
        "layers/fusion/patterns/maxout.py",
        "refusal = call_refusal(input) or layer_refusal(linear, nn.Linear)\n    if",
        "refusal = call_refusal(input)\n    if",
    ),
    Planted(
        "hooks that come after a chain has run",
        "layers/fusion/unchanged.py",
        'conditions += [f"not d[{hooks!r}]" for hooks in _HOOKS]',
        "",
    ),
    # --- The path that is taken ---
    Planted(
        "weights of another dtype aren't taken under autocast",
        "autograd/cross_entropy.py",
        "not (autocast_dtype(x) is not None and weight.dtype in AUTOCAST_TYPES)",
        "weight.dtype not in ()",
    ),
    Planted('padding="valid" isn\'t taken', "autograd/convolution.py", 'padding == "valid"', 'padding == "none"'),
    Planted(
        "leaves in place aren't left to stock",
        "autograd/dispatch.py",
        "first.requires_grad and first.is_leaf and torch.is_grad_enabled()",
        "first.requires_grad and first.is_leaf and not torch.is_grad_enabled()",
    ),
    Planted("one piece is taken", "autograd/maxout.py", "if pieces == 1:", "if pieces == 0:"),
    Planted(
        "a subclass of float is taken for a learning rate",
        "optim/refusals.py",
        "type(value) in (float, int)",
        "isinstance(value, (float, int))",
    ),
    Planted(
        "a subclass of Tensor is taken for a learning rate",
        "optim/refusals.py",
        "if type(value) is not Tensor:",
        "if not isinstance(value, Tensor):",
    ),
    Planted(
        "probabilities that require gradients are left to stock without a graph, too",
        "autograd/linear_cross_entropy.py",
        "target.requires_grad and torch.is_grad_enabled()",
        "target.requires_grad",
    ),
    Planted(
        "weights that require gradients are left to stock without a graph, too",
        "autograd/pointwise_loss.py",
        "weights.requires_grad and torch.is_grad_enabled()",
        "weights.requires_grad",
    ),
    # --- Errors and states ---
    Planted(
        "unknown names of activations",
        "autograd/activation.py",
        "raise ValueError(f\"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}\")",
        "name = None",
    ),
    Planted(
        "options of one parameter group",
        "optim/optimizer.py",
        "self._check_group({**self.defaults, **param_group})",
        "pass",
    ),
    Planted("options that replace gets", "optim/replace.py", "    check_options(options)\n", ""),
    Planted(
        "LBFGS, given to replace",
        "optim/replace.py",
        "if twin is None:",
        "if twin is None and not (twin := FusedOptimizer):",
    ),
    Planted(
        "states of negated views",
        "optim/refusals.py",
        "if tensor.is_neg() or tensor.is_inference():",
        "if tensor.is_inference():",
    ),
    Planted(
        "states that differ in dtype",
        "optim/refusals.py",
        "for tensor in tensors}) > 1:",
        "for tensor in tensors}) > 2:",
    ),
    Planted(
        "parameters of mixed dtypes",
        "autograd/dispatch.py",
        "if parameter.dtype != dtype or parameter.device",
        "if parameter.device",
    ),
    Planted(
        "float64 weights under autocast",
        "autograd/cross_entropy.py",
        "weight.dtype in AUTOCAST_TYPES)",
        "True)",
    ),
    Planted(
        "a synchronised batch norm in evaluation",
        "layers/sync_batch_norm.py",
        "layer.training and dist.is_available()",
        "layer.training or dist.is_available()",
    ),
    Planted(
        "one element an example, given to contrast normalisation",
        "layers/input_norm.py",
        "input.dim() < 2 or input.numel() == len(input) > 0",
        "input.dim() < 2",
    ),
    Planted(
        "elements of one example, given to contrast normalisation",
        "layers/input_norm.py",
        "input.numel() == len(input) > 0",
        "input.numel() == input.shape[-1] > 0",
    ),
    Planted(
        "a gain of zero",
        "layers/init.py",
        "nn.init.xavier_normal_, weight, gain=gain,",
        "nn.init.xavier_normal_, weight, gain=gain or 1.0,",
    ),
]
