"""What users install: the archives, a wheel, an editable install; and imports where Triton or a GPU is missing."""

import importlib.metadata
import os
import shutil
import site
import subprocess
import sys
import textwrap
import venv
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest

import fusednn

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "autograd", "layers", "optim")

pytestmark = pytest.mark.stock  # slow, and the same whatever runs the kernels
needs_build = pytest.mark.skipif(
    not all(find_spec(name) for name in ("build", "pip", "setuptools")), reason="needs build, pip and setuptools"
)


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What ``command`` prints; fails with its errors."""
    variables = os.environ | environment
    outcome = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)
    assert outcome.returncode == 0, f"{outcome.stdout}\n{outcome.stderr}"
    return outcome.stdout


def run_code(code: str, cwd: Path, python: str | Path = sys.executable, **environment: str) -> list[str]:
    """The lines that a program prints in a folder that holds no fusednn."""
    return run(python, "-c", textwrap.dedent(code), cwd=cwd, **environment).splitlines()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources: building writes into them."""
    copy = tmp_path_factory.mktemp("sources") / "checkout"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("fusednn", *FOLDERS):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source archive as an installer without a wheel would."""
    folder = tmp_path_factory.mktemp("archives")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, checkout, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", folder, wheel, cwd=folder)
    return folder


@needs_build
def test_wheel_holds_all_modules(checkout: Path, wheel: Path) -> None:
    names = set(ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"fusednn", f"fusednn-{fusednn.__version__}.dist-info"}
    bases = dict.fromkeys(FOLDERS, checkout) | {"fusednn": checkout / "fusednn"}
    sources = [(path, base) for name, base in bases.items() for path in (checkout / name).rglob("*.py")]
    expected = {f"fusednn/{path.relative_to(base).as_posix()}" for path, base in sources}
    assert {name for name in names if name.endswith(".py")} == expected
    assert "fusednn/py.typed" in names


@needs_build
def test_metadata(installed: Path) -> None:
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    assert distribution.metadata["Name"] == "fusednn"
    assert distribution.version == fusednn.__version__
    required = [one for one in distribution.requires or () if "extra ==" not in one]
    assert sorted(one.split(">=")[0] for one in required) == ["numpy", "torch", "triton"]
    assert any(file.name == "LICENSE" for file in distribution.files or ())


@needs_build
def test_wheel_works(installed: Path, tmp_path: Path) -> None:
    code = """
    import fusednn.kernels, torch
    print(fusednn.kernels.__file__)
    print(fusednn.layers.ReLU()(torch.tensor([-1.0, 2.0])).tolist())
    from fusednn import autograd
    x = torch.randn(2, 3, 4, 5)
    print(fusednn.testing.check_drop_in(autograd.relu, torch.nn.functional.relu, [x]).checked["exceptions"])
    print(len(fusednn.benchmark.one("relu", (8, 8), directions=["forward"])))
    """
    file, values, checked, measured = run_code(code, tmp_path, PYTHONPATH=str(installed))
    assert Path(file) == installed / "fusednn" / "kernels" / "__init__.py"
    assert (values, checked, measured) == ("[0.0, 2.0]", "8", "2")
    script = installed / "bin" / "fusednn"
    assert run(script, "--version", cwd=tmp_path, PYTHONPATH=str(installed)) == f"fusednn {fusednn.__version__}\n"


@needs_build
def test_editable_install(checkout: Path, tmp_path: Path) -> None:
    """In an empty environment that sees the packages of this one, but not what is installed here as editable."""
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    (packages,) = (environment / "lib").glob("python*/site-packages")
    own_packages = [path for path in (*site.getsitepackages(), site.getusersitepackages()) if Path(path).is_dir()]
    (packages / "borrowed.pth").write_text("\n".join(own_packages) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
    run(*pip, "install", *options, "--editable", checkout, cwd=tmp_path)

    (checkout / "kernels" / "added_later.py").write_text("ANSWER = 42\n")
    code = """
    import fusednn, fusednn.kernels.added_later, torch
    for module in (fusednn, fusednn.kernels, fusednn.autograd, fusednn.layers, fusednn.optim):
        print(module.__file__)
    print(fusednn.kernels.added_later.ANSWER)
    print(fusednn.layers.ReLU()(torch.tensor([-1.0, 2.0])).tolist())
    """
    try:
        *files, answer, values = run_code(code, tmp_path, python)
    finally:
        (checkout / "kernels" / "added_later.py").unlink()
    assert [Path(file) for file in files] == [checkout / name / "__init__.py" for name in ("fusednn", *FOLDERS)]
    assert answer == "42"
    assert values == "[0.0, 2.0]"


TRAINING_STEP = """
from torch import nn

def train(replace):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.PReLU(8), nn.GELU(), nn.Linear(8, 2))
    if replace:
        assert fusednn.replace_layers(model)
        assert type(model[1]) is fusednn.layers.ReLU
        assert type(model[3]) is fusednn.layers.PReLU
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.clone() for p in model.parameters()]
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(before, model.parameters()))
    return list(model.parameters())

assert all(torch.equal(p, q) for p, q in zip(train(False), train(True)))
print("trained")
"""


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_without_triton(interpret: str, tmp_path: Path) -> None:
    """As on macOS and Windows; asking for the interpreter doesn't help there."""
    blocked = "import sys; sys.modules['triton'] = None; import torch, fusednn"
    checks = """
from fusednn.__main__ import main
assert fusednn.kernels.AVAILABLE is False
assert fusednn.kernels.INTERPRETING is False
assert not [name for name, module in sys.modules.items() if name.startswith("triton") and module is not None]
# What tools of documentation ask of everything in a module: stand-ins stand for nothing else.
import inspect
from fusednn.kernels.base import numerics
assert all(inspect.unwrap(one) is one for one in vars(numerics).values())
assert main(["info"]) == 0
assert main(["check"]) == 2
"""
    lines = run_code(f"{blocked}\n{checks}\n{TRAINING_STEP}", tmp_path, TRITON_INTERPRET=interpret)
    assert [line.split(maxsplit=2)[2] for line in lines if line.startswith("CPU tensors")] == ["stock operators"]
    assert lines[-1] == "trained"


def test_without_gpu_or_driver(tmp_path: Path) -> None:
    """Nothing asks for a driver, at import or while CPU tensors train."""
    pytest.importorskip("triton")
    absent = """
import torch, triton

def refuse(*_, **__):
    raise RuntimeError("there is no driver")

torch.cuda._lazy_init = refuse
type(triton.runtime.driver).active = property(refuse)
try:
    triton.runtime.driver.active
except RuntimeError:
    print("no driver")
import fusednn
assert fusednn.kernels.AVAILABLE
"""
    code = f"{absent}\n{TRAINING_STEP}\nassert not torch.cuda.is_initialized()"
    assert run_code(code, tmp_path, CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="0") == ["no driver", "trained"]
