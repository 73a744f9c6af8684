"""The figures that don't depend on a machine, as they are committed: ``python -m fusednn bench baseline [--check]``.

Bytes and launches of every counted case; registers and spills of every shipped configuration that isn't rare, for
sm_90; sectors, waves of shared memory and instructions of a representative size of each family, on the virtual GPU;
launches over a driver that does nothing, and which of them Triton and PyTorch's dispatcher had a part in; instructions
for a thousand elements, and spills, of a few launches at sizes that networks have.  Tests fail
where one is worse than ``baseline.json``, so that a change which makes it worse has to say so there.  What Triton has
compiled before it takes from its cache: after a small change, and when interrupted, little is done again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCH))

FILE = BENCH / "baseline.json"

#: What the figures of an entry are.
FIGURES = {
    "counted": ("bytes", "launches"),
    "compiled": ("registers", "spills"),
    "executed": ("sectors", "waves", "instructions"),
    "host": ("launches", "prepared", "dispatched"),
    "instructions": ("instructions", "spills"),
}

Entries = dict[str, list[int]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or with ``--check`` 1 where a figure isn't the baseline's."""
    parser = argparse.ArgumentParser(prog="fusednn bench baseline", description="Write down the deterministic figures.")
    parser.add_argument("--only", choices=list(FIGURES), help="one of the parts; the others stay as they are")
    parser.add_argument("--check", action="store_true", help="write nothing; tell what is better and worse")
    parser.add_argument("--part", choices=list(FIGURES), help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.part:
        print(json.dumps(_PARTS[parsed.part]()))
        return 0
    made = {part: _in_another_process(part) for part in FIGURES if parsed.only in (None, part)}
    before = load() if FILE.exists() else {}
    after = {"versions": versions(), **{part: made.get(part, before.get(part, {})) for part in FIGURES}}
    differences = [line for part in FIGURES for line in compare(part, after[part], before.get(part, {}))]
    print("\n".join(differences) or "as the baseline")
    if parsed.check:
        return int(bool(differences))
    FILE.write_text(_text(after), encoding="utf-8")
    return 0


def load() -> dict[str, Any]:
    baseline: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return baseline


def versions() -> dict[str, str]:
    """Of what the figures depend on: another compiler allots other registers, another PyTorch calls other operators."""
    import torch
    import triton

    return {"torch": torch.__version__.partition("+")[0], "triton": triton.__version__}


def compare(part: str, now: Mapping[str, Sequence[int]], before: Mapping[str, Sequence[int]]) -> Iterator[str]:
    """What differs, in words: better, worse, new and gone."""
    for name in sorted({*now, *before}):
        if name not in before:
            yield f"{part} {name}: new"
        elif name not in now:
            yield f"{part} {name}: gone"
        elif (found := list(now[name])) != list(before[name]):
            word = "worse" if worse(part, found, before[name]) else "better"
            yield f"{part} {name}: {word}: {', '.join(FIGURES[part])} {found}, were {list(before[name])}"


def worse(part: str, now: Sequence[int], before: Sequence[int] | None) -> str | None:
    """What is worse than the baseline's entry, in words; None where nothing is.  What isn't there is no better."""
    if before is None:
        return "isn't in the baseline"
    pairs = zip(FIGURES[part], now, before, strict=True)
    return ", ".join(f"{found} {name}, not {known}" for name, found, known in pairs if found > known) or None


def counted_entries(case: Any) -> tuple[Entries, list[dict[str, Any]]]:
    """Ours, for each direction of a case; and its records.  Whether results are right, others check."""
    from fusednn_bench.measure import count

    records = count(case, checked=False)
    ours = [record for record in records if record["contestant"] == "fusednn"]
    return {f"{case.id} {record['direction']}": [record["bytes"], record["launches"]] for record in ours}, records


def _counted() -> Entries:
    entries: Entries = {}
    for path in sorted(BENCH.glob("bench_*.py")):
        for case in import_module(path.stem).counted_cases():
            entries |= counted_entries(case)[0]
    return entries


def _compiled() -> Entries:
    from fusednn import kernels
    from fusednn.instruments.compile_check import compile_configuration

    entries: Entries = {}
    configurations = [configuration for configuration in kernels.shipped() if not configuration.rare]
    for i, configuration in enumerate(configurations, 1):
        print(f"\r{i} of {len(configurations)}", end="", file=sys.stderr, flush=True)
        code = compile_configuration(configuration, "sm_90").machine_code
        if code is None:
            raise SystemExit(f"{configuration.label} doesn't compile")
        entries[configuration.label] = [code.registers, code.spills]
    print(file=sys.stderr)
    return entries


def _executed() -> Entries:
    from executed import entries

    return entries()


def _host() -> Entries:
    from fusednn_bench.do_nothing import install

    launches = install()
    from fusednn_bench.host_cases import KERNELS, host_cases
    from host import records

    entries: Entries = {}
    for case in host_cases():
        name = f"{case.operation} {case.direction} {'x'.join(map(str, case.shape))}"
        found = {record["contestant"]: record for record in records(case, launches, timed=False)}
        ours = found.get(KERNELS, found["fusednn"])
        entries[name] = [ours[figure] for figure in FIGURES["host"]]
    return entries


def _instructions() -> Entries:
    from instructions import entries

    return entries()


_PARTS: dict[str, Callable[[], Entries]] = {
    "counted": _counted,
    "compiled": _compiled,
    "executed": _executed,
    "host": _host,
    "instructions": _instructions,
}
#: Where kernels run in each, as Triton and the tests are told.
_MODES = {
    "counted": {"TRITON_INTERPRET": "1"},
    "compiled": {"TRITON_INTERPRET": "0"},
    "executed": {"TRITON_INTERPRET": "0", "FUSEDNN_VGPU": "80"},
    "host": {"TRITON_INTERPRET": "0"},
    "instructions": {"TRITON_INTERPRET": "0"},
}


def _in_another_process(part: str) -> Entries:
    """Whether kernels are interpreted or compiled, Triton decides when it is imported."""
    environment = {**os.environ, **_MODES[part]}
    command = [sys.executable, __file__, "--part", part]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"baseline: the {part} figures can't be had")
    entries: Entries = json.loads(done.stdout.splitlines()[-1])
    return entries


def _text(baseline: Mapping[str, Any]) -> str:
    """A line for each entry, so that differences read well."""
    parts = []
    for part, entries in baseline.items():
        lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in sorted(entries.items())]
        parts.append(f'"{part}": {{\n' + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
