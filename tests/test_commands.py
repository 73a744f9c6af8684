"""The command line: ``python -m fusednn info`` and ``check``.  ``demo`` and ``bench`` have test files of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fusednn
from fusednn import kernels
from fusednn.__main__ import main
from fusednn.commands import check, check_words, self_test


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a shell would run it."""
    command = [sys.executable, "-m", "fusednn", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)


@pytest.mark.stock
def test_version() -> None:
    outcome = run_command("--version")
    assert outcome.stdout == f"fusednn {fusednn.__version__}\n"
    assert outcome.returncode == 0


@pytest.mark.parametrize("arguments", [[], ["polish"], ["info", "--loud"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 2
    assert capsys.readouterr().err.startswith("usage: fusednn")


def test_help_lists_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["--help"])
    assert exited.value.code == 0
    text = capsys.readouterr().out
    assert all(f"    {command} " in text for command in ("info", "check", "demo", "bench"))


def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["fusednn"] == fusednn.__version__
    assert facts["torch"] == torch.__version__
    assert facts["gpus"] == torch.cuda.device_count()
    assert (facts["triton"] is not None) == kernels.AVAILABLE
    assert ("interpreter" in facts["CPU tensors"]) == kernels.INTERPRETING


def test_info_has_what_a_report_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/somewhere")
    monkeypatch.setenv("CC", "/usr/bin/some-compiler")
    monkeypatch.setenv("PASSWORD", "secret")
    assert main(["info", "--full"]) == 0
    text = capsys.readouterr().out
    for expected in ("TRITON_CACHE_DIR=/somewhere", "/usr/bin/some-compiler", str(Path(fusednn.__file__).parent)):
        assert expected in text
    assert "PyTorch version: " in text  # of torch.utils.collect_env
    assert "secret" not in text


def test_info_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["fusednn"].strip() == fusednn.__version__
    assert lines["torch"].strip() == torch.__version__


@pytest.mark.compiles
def test_check_compiles_in_processes() -> None:
    """And tests the same family, in the interpreter."""
    outcome = run_command("check", "--family", "rrelu", "--target", "sm_90", "--jobs", "2", "--json")
    assert outcome.returncode == 0, outcome.stderr
    facts = json.loads(outcome.stdout)
    assert [(one["name"], one["problems"]) for one in facts["tested"]] == [("RReLU", [])] * 4
    assert all(0 <= one["error"] < 10 for one in facts["tested"])
    checked = facts["compiled"]
    assert [one["kernel"] for one in checked] == [one.label for one in kernels.shipped("rrelu")]
    assert all(one["target"] == "sm_90" for one in checked)
    assert all(one["problems"] == [] for one in checked)
    assert all(one["registers"] > 0 and one["instructions"] > 0 and one["spills"] == 0 for one in checked)


def outcome_with(*problems: str) -> check.Outcome:
    return check.Outcome("relu forward fp32", "sm_90", 0.5, 32, 0, 0, 4, 4, 100, problems)


@pytest.mark.compiles
@pytest.mark.parametrize("as_json", [True, False])
def test_check_reports_problems(
    as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compile_all(family: str | None, count: int, targets: list[str], jobs: int) -> Iterator[check.Outcome]:
        assert targets == ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"]
        yield from (outcome_with(), outcome_with("spills", "too slow"))

    monkeypatch.setattr(check, "_compile_all", compile_all)
    assert main(["check", "--no-self-test", *(["--json"] if as_json else [])]) == 1
    text = capsys.readouterr().out
    if as_json:
        assert [one["problems"] for one in json.loads(text)["compiled"]] == [[], ["spills", "too slow"]]
    else:
        assert "spills; too slow" in text
        assert "1 of 2 pass\n" in text
        assert "1 of the kernels' configurations compile for sm_90" in text
        assert "1 of 2 kernels' configurations, which FAIL" in text
        assert "what kernels compute (it was left out: --no-self-test)" in text


def test_check_says_what_it_proved() -> None:
    def result(*problems: str) -> self_test.Result:
        return self_test.Result("pool", "MaxPool2d", "float32", 0.1, 0.1, problems)

    words = check_words.conclusion([], [result(), result()], "in Triton's interpreter", "pool", False)
    proved, _, left = words.partition("Not proved here:")
    assert "of 1 of our layers, functions and optimizers, in 1 dtypes" in proved
    assert "computes with NumPy" in left
    assert "other families than pool" in left
    assert "--no-compile" in left
    on_gpu = check_words.conclusion([outcome_with()], [result()], "on the GPU", None, True)
    assert "other GPUs than this one" in on_gpu
    assert "captured in graphs" not in on_gpu
    assert "nothing" in check_words.conclusion([], [result("wrong")], "on the GPU", None, True)
    assert {self_test.where()} <= set(check_words._OPEN)


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--target", "sm_90", "--target", "sm_12"],
            "unknown target sm_12; known: sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, gfx942",
        ),
        (["--family", "sandwich"], "no family is called sandwich"),
        (["--no-compile", "--no-self-test"], "nothing left to check: choose --no-compile or --no-self-test"),
    ],
)
def test_check_rejects(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *arguments]) == 2
    assert capsys.readouterr().err.strip() == message


@pytest.mark.stock
@pytest.mark.skipif(not kernels.AVAILABLE, reason="Triton is not installed")
def test_check_refuses_the_interpreter() -> None:
    outcome = run_command("check", TRITON_INTERPRET="1")
    assert outcome.returncode == 2
    assert "unset TRITON_INTERPRET" in outcome.stderr
