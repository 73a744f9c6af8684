"""PyTorch's own functions, as they were when the library was imported.

The library calls these, never ``torch.nn.functional``'s by name: a program may have put ours in their place.
"""

import torch
from torch.nn.functional import *  # noqa: F403

sigmoid, tanh = torch.sigmoid, torch.tanh  # in functional they are Python functions around these
