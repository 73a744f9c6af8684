"""The peak of networks' training steps: measured by a GPU's allocator, rehearsed where tensors are counted."""

# ruff: noqa: E402
from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))  # the benchmarks are no package: they are not installed

import memory
from fusednn_bench import networks, render, results
from fusednn_bench.goals import Goal, judge
from fusednn_bench.memory import NETWORKS
from fusednn_bench.memory_peak import enlarged
from fusednn_bench.networks import Network, NetworkCase
from fusednn_bench.peak import Allocated, Peak
from torch import nn

from fusednn.testing import random_tensor


@pytest.mark.kernels
def test_networks_take_part_with_results_made_again() -> None:
    """They are right, and their step holds less."""

    def build(width: int) -> nn.Module:
        halves = [layer for _ in range(2) for layer in (nn.Conv2d(1, width, 1), nn.SiLU(), nn.Conv2d(width, 1, 1))]
        return nn.Sequential(*halves, nn.Flatten())

    network = Network("small", build, lambda batch, size: random_tensor((batch, 1, size, size), torch.float32, "cpu"))
    case = NetworkCase(network, torch.float32, "counted", 8, 2, 4)
    assert networks.check(case, "fusednn-recompute", torch.device("cpu")) >= 0
    held = []
    for name in ("fusednn", "fusednn-recompute"):
        trainer = networks.Trainer(case, name, torch.device("cpu"))
        with Peak(trainer.model.parameters()) as peak:
            trainer.forward().backward()
        held.append(peak.bytes)
    assert held[1] < held[0]


def test_peaks_are_judged_and_shown(tmp_path: Path) -> None:
    """In rehearsal, where tensors are counted; the allocator of a GPU, which isn't there, is asked the same."""
    file = tmp_path / "peak.json"
    name = "MLP, GELU and dropout"
    assert memory.main(["--peak", "--rehearse", "-o", str(file), name]) == 0
    result = results.load_result(file)
    assert not result["complete"]
    peaks = {record["contestant"]: record["peak_bytes"] for record in result["cases"]}
    kept = {record["contestant"]: record["kept_bytes"] for record in result["cases"]}
    assert kept["fusednn-recompute"] < kept["fusednn"] < kept["eager"] < peaks["eager"]
    assert peaks["fusednn-recompute"] < peaks["fusednn"]
    ratio = f"{peaks['fusednn-recompute'] / peaks['eager']:.2f}"
    goal = Goal("peak", (name,), "training_step", ("small",), "peak", "eager", at_most=1.0, of="fusednn-recompute")
    (verdict,) = judge([result], [goal])
    assert (f"{verdict.value:.2f}", verdict.outcome) == (ratio, "met")
    row = next(line for line in render.render({"peak": result}, [goal]).splitlines() if "64x256" in line)
    assert [cell.strip() for cell in row.split("|")][6] == ratio


def test_peaks_want_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert memory.main(["--peak", "-o", str(tmp_path / "peak.json")]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_allocator_is_asked_beside_what_it_held(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"memory_allocated": 100, "max_memory_allocated": 900}
    for name in now:
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: now[name])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: now.update(max_memory_allocated=100))
    with Allocated(torch.device("cuda")) as memory:
        now.update(memory_allocated=130, max_memory_allocated=150)
        assert (memory.held, memory.bytes) == (30, 50)


def test_every_network_has_a_batch_that_fills_a_gpu() -> None:
    for case in NETWORKS:
        large = enlarged(case)
        assert (large.size, large.shape[-1] >= case.shape[-1]) == ("large", True)
        assert math.prod(large.shape) >= 128 * math.prod(case.shape)
