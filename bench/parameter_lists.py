"""Writes ``parameter_lists.json``: the shapes of all parameters of two networks, from their definitions.

ResNet-50: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition" (CVPR 2016), table 1, with 1000 classes.
The transformer is TinyLlama 1.1B's: Zhang, Zeng, Wang, Lu, "TinyLlama: An Open-Source Small Language Model" (2024).
"""

import json
from pathlib import Path

FILE = Path(__file__).parent / "parameter_lists.json"
Shape = tuple[int, ...]


def resnet50() -> list[Shape]:
    def convolution(inputs: int, outputs: int, size: int) -> list[Shape]:
        """Its weight, and the weight and bias of the batch norm after it."""
        return [(outputs, inputs, size, size), (outputs,), (outputs,)]

    shapes = convolution(3, 64, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += convolution(inputs, width, 1) + convolution(width, width, 3) + convolution(width, 4 * width, 1)
            if block == 0:
                shapes += convolution(inputs, 4 * width, 1)  # the shortcut
            inputs = 4 * width
    return [*shapes, (1000, inputs), (1000,)]


def transformer_1b() -> list[Shape]:
    vocabulary, width, layers, heads, key_heads, hidden = 32000, 2048, 22, 32, 4, 5632
    keys = width // heads * key_heads
    attention = [(width, width), (keys, width), (keys, width), (width, width)]
    perceptron = [(hidden, width), (hidden, width), (width, hidden)]
    layer = [(width,), *attention, (width,), *perceptron]
    return [(vocabulary, width), *layer * layers, (width,), (vocabulary, width)]


def networks() -> dict[str, list[Shape]]:
    return {"resnet50": resnet50(), "transformer_1b": transformer_1b()}


if __name__ == "__main__":
    FILE.write_text(json.dumps(networks()) + "\n")
