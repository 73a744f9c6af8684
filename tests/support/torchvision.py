"""torchvision, also where its wheel doesn't fit the installed torch."""

from importlib import import_module

import torch

_libraries: list[torch.library.Library] = []  # operators vanish with the library that declared them


def mend_torchvision() -> None:
    """Make torchvision importable where it is built for CUDA, and torch isn't: it describes operators that it lacks.

    transformers imports it, too.
    """
    try:
        import_module("torchvision")
    except ImportError:
        return
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        _libraries.append(library)
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
