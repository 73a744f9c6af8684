"""transformers' blocks, which derive from its GradientCheckpointingLayer: replaced, with and without checkpointing."""

import copy
from typing import Any

import pytest
import torch
from support.device import KERNELS_RUN
from support.torchvision import mend_torchvision
from torch import Tensor, nn

import fusednn
from fusednn.autograd.dispatch import observe_choices

TEXT = {"vocab_size": 64, "hidden_size": 16, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
BERT = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
MODELS = {
    "Bert": {**TEXT, **BERT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "Bloom": {**TEXT, "n_layer": 1, "n_head": 2},
    "Llama": {**TEXT, **BERT, "num_key_value_heads": 2},
}
#: What the kernels of a block compute once, and how often the whole model does: BERT's pooler has an activation, too.
OPERATIONS = {"Bert": ("bias_activation", 2), "Bloom": ("softmax", 1), "Llama": ("gated", 1)}


def model_and_tokens(name: str, device: str) -> tuple[Any, Tensor]:
    """A model with one block, and its tokens."""
    mend_torchvision()
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**MODELS[name]))
    return model.to(device).train(), torch.arange(8, device=device).view(2, 4)


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
@pytest.mark.parametrize("name", MODELS)
def test_blocks(name: str, reentrant: bool | None, device: str) -> None:
    """Values and gradients; a checkpointed block's kernels run once more, in the backward pass."""
    stock, tokens = model_and_tokens(name, device)
    model = copy.deepcopy(stock)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fusednn.replace_layers(model, fuse=True)
    chosen: list[str] = []

    def gradients(one: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        y = one(tokens, use_cache=False).last_hidden_state
        chosen.append("backward")
        y.cos().sum().backward()
        return y, {key: parameter.grad for key, parameter in one.named_parameters() if parameter.grad is not None}

    expected = gradients(stock)
    chosen.clear()
    with observe_choices(lambda choice: chosen.append(choice.operation) if choice.kernel else None):
        torch.testing.assert_close(gradients(model), expected)
    operation, calls = OPERATIONS[name]
    begun = chosen.index("backward")
    assert chosen[:begun].count(operation) == calls * KERNELS_RUN
    assert chosen[begun:].count(operation) == (reentrant is not None) * KERNELS_RUN
