"""Builds handlers with gcc: each once, for all kernels and all runs."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from .steps import Kind, Step

__all__ = ["CACHE", "MISSING", "Handlers", "handler_name", "handlers", "write_atomically"]

#: Where compiled kernels, their programs and handlers are kept between runs.
CACHE = Path(os.environ.get("VGPU_CACHE", Path(__file__).parents[2] / ".cache" / "vgpu"))
#: Why there is no virtual GPU on this machine, or "".
MISSING = "" if shutil.which("gcc") else "the virtual GPU's handlers are built with gcc, which isn't installed"

_NATIVE = Path(__file__).parent / "native"
_FLAGS = ("-O2", "-ftree-vectorize", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
_FLAGS += ("-fno-strict-aliasing", "-fwrapv", "-fPIC", "-shared")


def handler_name(step: Step) -> str:
    """Steps whose handlers do the same on rows of the same types have the same one."""
    parts = (step.kind, tuple(row.type for row in step.rows), step.before, step.pure, step.handler)
    return f"handler_{hashlib.sha256(repr(parts).encode()).hexdigest()[:20]}"


def _source(name: str, step: Step) -> str:
    text = f"void {name}(Block *block, Warp *warp, u32 mask, const Step *step) {{\n"
    if step.kind is not Kind.LANES:
        return f"{text}  {step.handler}\n}}\n"
    for n, row in enumerate(step.rows):
        text += f"  {row.type} *P{n} = ROW{row.type[1:]}({n});\n"
    if step.before:
        text += f"  {step.before}\n"
    if step.pure:  # all lanes at once: gcc makes vectors of the loop; results overwrite operands lane by lane
        text += "  if (mask == ~0u) {\n#pragma GCC ivdep\n"
        text += f"    for (int lane = 0; lane < 32; lane++) {{ {step.handler} }}\n  }} else\n"
    return f"{text}  FOR_LANES(mask) {{ {step.handler} }}\n}}\n"


def write_atomically(path: Path, content: bytes) -> None:
    """Other processes see all of it, or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


class Handlers:
    """The machine, and all handlers known so far, in a folder of libraries; an index beside each lists its handlers."""

    def __init__(self) -> None:
        if MISSING:
            raise RuntimeError(MISSING)
        texts = [path.read_bytes() for path in sorted(_NATIVE.iterdir())]
        # What gcc defines for this processor tells it from others that may share the folder.
        described = subprocess.run(
            ["gcc", *_FLAGS, "-E", "-dM", "-x", "c", os.devnull], capture_output=True, check=True
        )
        key = hashlib.sha256(b"".join([*texts, described.stdout, repr(_FLAGS).encode()])).hexdigest()[:16]
        self._folder = CACHE / f"handlers-{key}"
        machine = self._folder / "machine.so"
        if not machine.exists():
            self._build((_NATIVE / "machine.c").read_text(), machine)
        self.machine = ctypes.CDLL(str(machine))
        self.machine.run_launch.argtypes = [ctypes.c_void_p]
        self._libraries: dict[Path, ctypes.CDLL] = {}
        self._library_of: dict[str, Path] = {}
        self._read: set[Path] = set()
        self.built = 0

    def addresses(self, steps: Iterable[tuple[str, Step]]) -> dict[str, int]:
        """Handlers by name; those that are missing are built."""
        wanted = dict(steps)
        if not wanted.keys() <= self._library_of.keys():
            self._read_indices()
        missing = {name: step for name, step in wanted.items() if name not in self._library_of}
        if missing:
            stem = hashlib.sha256("".join(sorted(missing)).encode()).hexdigest()[:20]
            source = '#include "matrix.h"\n' + "".join(_source(name, step) for name, step in missing.items())
            self._build(source, self._folder / f"{stem}.so")
            write_atomically(self._folder / f"{stem}.index", "\n".join(missing).encode())
            self.built += len(missing)
            self._read_indices()
        return {name: self._address(name) for name in wanted}

    def _read_indices(self) -> None:
        for index in set(self._folder.glob("*.index")) - self._read:
            self._read.add(index)
            self._library_of.update(dict.fromkeys(index.read_text().split(), index.with_suffix(".so")))

    def _address(self, name: str) -> int:
        path = self._library_of[name]
        if path not in self._libraries:
            self._libraries[path] = ctypes.CDLL(str(path))
        return ctypes.cast(getattr(self._libraries[path], name), ctypes.c_void_p).value or 0

    @staticmethod
    def _build(source: str, target: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            file, library = Path(scratch, "handlers.c"), Path(scratch, "handlers.so")
            file.write_text(source)
            command = ["gcc", *_FLAGS, f"-I{_NATIVE}", str(file), "-o", str(library), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"gcc failed:\n{done.stderr[:3000]}")
            write_atomically(target, library.read_bytes())


@cache
def handlers() -> Handlers:
    """Those of this process."""
    return Handlers()
