"""Writes the table of docs/libraries.md, from small models of timm, torchvision and transformers.

``TRITON_INTERPRET=1 PYTHONPATH=.build/models:tests python docs/libraries.py``: kernels are chosen, and not run.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn

import fusednn
from fusednn.instruments.operators_left import LeftOperator, operators_left
from fusednn.instruments.saved_tensors import saved_tensors

PAGE = Path(__file__).resolve().with_suffix(".md")
BEGIN, END = "<!-- models: begin (docs/libraries.py) -->", "<!-- models: end -->"

_TEXT = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_ENCODER = {**_TEXT, "intermediate_size": 32}
_DECODER = {**_ENCODER, "num_key_value_heads": 2, "pad_token_id": 0}
_GPT = {"vocab_size": 64, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
_VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


class Model(NamedTuple):
    """A model by its library and name, and how it is built of the library, with the input that it is called with."""

    library: str
    name: str
    build: Callable[[Any], nn.Module]
    input: Callable[[], dict[str, Any]]


def images(name: str = "x", size: int = 32) -> Callable[[], dict[str, Any]]:
    return lambda: {name: torch.rand(2, 3, size, size)}


def words(*names: str) -> Callable[[], dict[str, Any]]:
    return lambda: {name: torch.arange(16).view(2, 8) for name in names or ("input_ids",)}


def timm(name: str, size: int = 32, **options: Any) -> Model:
    return Model("timm", name, lambda library: library.create_model(name, num_classes=3, **options), images(size=size))


def torchvision(name: str, size: int = 32, **options: Any) -> Model:
    def build(library: Any) -> nn.Module:
        model: nn.Module = library.models.get_model(name, weights=None, num_classes=3, **options)
        return model

    return Model("torchvision", name, build, images(size=size))


def transformers(name: str, config: str, options: dict[str, Any], input: Callable[[], dict[str, Any]]) -> Model:
    def build(library: Any) -> nn.Module:
        model: nn.Module = getattr(library, name)(getattr(library, config)(**options))
        return model

    return Model("transformers", name, build, input)


MODELS = (
    torchvision("resnet18"),
    torchvision("regnet_y_400mf"),
    torchvision("convnext_tiny"),
    torchvision("swin_t"),
    torchvision("googlenet", aux_logits=False, init_weights=False),
    torchvision("densenet121"),
    timm("efficientnet_b0"),
    timm("mobilenetv3_small_050"),
    timm("resnetv2_50"),
    timm("regnety_002"),
    timm("densenet121"),
    timm("convnext_atto", drop_path_rate=0.1),
    transformers("BertForSequenceClassification", "BertConfig", _ENCODER, words()),
    transformers("RobertaForSequenceClassification", "RobertaConfig", _ENCODER, words()),
    transformers(
        *("DistilBertForSequenceClassification", "DistilBertConfig"),
        {"vocab_size": 64, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
        words(),
    ),
    transformers("ViTForImageClassification", "ViTConfig", {**_VISION, "image_size": 32}, images("pixel_values")),
    transformers("GPT2LMHeadModel", "GPT2Config", {**_GPT, "n_embd": 16}, words()),
    transformers("BloomForCausalLM", "BloomConfig", {**_GPT, "hidden_size": 16, "pad_token_id": 0}, words()),
    transformers("LlamaForCausalLM", "LlamaConfig", _DECODER, words()),
    transformers(
        *("T5ForConditionalGeneration", "T5Config"),
        {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
        words("input_ids", "decoder_input_ids"),
    ),
    transformers(
        "OPTForCausalLM", "OPTConfig", {**_TEXT, "ffn_dim": 32, "word_embed_proj_dim": 16, "pad_token_id": 0}, words()
    ),
    transformers(
        *("ResNetForImageClassification", "ResNetConfig"),
        {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]},
        images("pixel_values"),
    ),
    # Ten more.
    timm("resnet18"),
    timm("vit_tiny_patch16_224", img_size=32),
    timm("mobilenetv2_050"),
    timm("ghostnet_050"),
    timm("mixer_s32_224", img_size=32),
    transformers("MistralForCausalLM", "MistralConfig", _DECODER, words()),
    transformers("GemmaForCausalLM", "GemmaConfig", {**_DECODER, "head_dim": 8}, words()),
    transformers("Qwen2ForCausalLM", "Qwen2Config", _DECODER, words()),
    transformers("Phi3ForCausalLM", "Phi3Config", _DECODER, words()),
    transformers("ElectraForSequenceClassification", "ElectraConfig", {**_ENCODER, "embedding_size": 16}, words()),
    # The ends of blocks, segmentation and detection.
    torchvision("efficientnet_b0"),
    torchvision("vit_b_16", image_size=32),
    torchvision("deeplabv3_resnet50", weights_backbone=None),
    timm("vit_small_patch14_dinov2", img_size=28, drop_path_rate=0.1, size=28),
    timm("swin_tiny_patch4_window7_224", img_size=64, window_size=2, drop_path_rate=0.1, size=64),
    timm("resnet50d"),
    transformers(
        *("Dinov2ForImageClassification", "Dinov2Config"),
        {**_VISION, "image_size": 28, "drop_path_rate": 0.1},
        images("pixel_values", 28),
    ),
    transformers(
        *("ConvNextForImageClassification", "ConvNextConfig"),
        {"hidden_sizes": [4, 8, 8, 8], "depths": [1, 1, 1, 1], "drop_path_rate": 0.1},
        images("pixel_values"),
    ),
    transformers(
        *("SegformerForSemanticSegmentation", "SegformerConfig"),
        {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
        | {"decoder_hidden_size": 8, "drop_path_rate": 0.1},
        images("pixel_values", 64),
    ),
)


def row(model: Model) -> str:
    """Of a model in training: PyTorch's operators that there are kernels for, how many are left, which, and why; how
    many layers are computed with neighbours, and what is kept for the backward pass, as a part of what stock keeps.
    """
    library = import_module(model.library)
    torch.manual_seed(0)
    network = model.build(library).train()
    arguments = model.input()
    inputs = arguments.values() if "x" in arguments else ()
    options = {} if "x" in arguments else arguments

    def count() -> tuple[list[LeftOperator], int]:
        with saved_tensors() as census:
            left = operators_left(network, *inputs, **options)
        return left, census.bytes_beside(*network.parameters())

    stock, stock_bytes = count()
    report = fusednn.replace_layers(network, fuse=True)
    left, kept = count()
    with torch.no_grad(), fusednn.replace_functions():
        functions = operators_left(network, *inputs, **options)
    with saved_tensors() as census, fusednn.recompute():
        network(*inputs, **options)
    again = census.bytes_beside(*network.parameters())
    reasons = dict.fromkeys(f"{one.operator.strip('_')} in `{one.cls}`: {one.reason}" for one in left)
    fused = sum(one.reason.startswith("fused") for one in report.rows)
    figures = (*map(calls, (stock, left, functions)), fused, *(f"{part / stock_bytes:.0%}" for part in (kept, again)))
    return f"| {model.library} | {model.name} | {' | '.join(map(str, figures))} | {'; '.join(reasons) or '-'} |"


def calls(operators: list[LeftOperator]) -> int:
    return sum(one.calls for one in operators)


def table() -> str:
    head = [
        "| library | model | stock | left | with functions | fused | kept | with recompute | left: which, and why |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    with mock.patch("triton.runtime.interpreter.GridExecutor.__call__", return_value=None):
        return "\n".join([*head, *map(row, MODELS)])


def updated(page: str) -> str:
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> None:
    from support.torchvision import mend_torchvision

    mend_torchvision()
    PAGE.write_text(updated(PAGE.read_text()))


if __name__ == "__main__":
    main()
