"""Where the tests run: CUDA where there is a GPU, otherwise the CPU, with or without the interpreter."""

import torch

from fusednn.kernels import AVAILABLE, INTERPRETING

ON_GPU = torch.cuda.is_available() and not INTERPRETING
DEVICE = "cuda" if ON_GPU else "cpu"
#: Whether kernels run here: in the interpreter, or on a GPU.
KERNELS_RUN = AVAILABLE and (INTERPRETING or ON_GPU)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
