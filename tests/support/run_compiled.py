"""``python -m support.run_compiled MODULE ARGUMENT...``: run a module with kernels on the virtual GPU.

FUSEDNN_VGPU=80 PYTHONPATH=tests python -m support.run_compiled fusednn check --no-compile
"""

import runpy
import sys

from support.compiled import ARCHITECTURE, MISSING

if __name__ == "__main__":
    if len(sys.argv) < 2 or not ARCHITECTURE:
        sys.exit(__doc__)
    if MISSING:
        sys.exit(MISSING)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
