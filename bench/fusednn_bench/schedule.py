"""Runs parts within their time, whatever their commands do, and knows what an earlier call has done."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .parts import NO_TESTS, ROOT, Command, Part

__all__ = ["GRACE_SECONDS", "Outcome", "run_part", "run_parts"]

#: From the interrupt, on which pytest writes what it has, to the kill.
GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.05
#: A part that can't have this much isn't begun.
_LEAST_SECONDS = 2.0


@dataclass(frozen=True)
class Outcome:
    """How a command ended: ``code`` is None where it ran out of time."""

    part: str
    command: str
    code: int | None
    seconds: float

    @property
    def passed(self) -> bool:
        return self.code in (0, NO_TESTS)

    @property
    def words(self) -> str:
        if self.code is None:
            return "out of time"
        return "passed" if self.passed else f"killed by signal {-self.code}" if self.code < 0 else f"exit {self.code}"


class _Process:
    """A command that runs in a process group of its own, its output in a log."""

    def __init__(self, command: Command, log: Path, environment: Mapping[str, str]) -> None:
        self.command = command
        self._started, self._late = time.monotonic(), False
        with log.open("ab") as file:
            try:
                self._process = subprocess.Popen(
                    command.line,
                    cwd=ROOT,
                    env={**environment, **command.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:  # a tool that isn't installed
                file.write(f"{error}\n".encode())
                self._process = None

    @property
    def ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    @property
    def age(self) -> float:
        return time.monotonic() - self._started

    def interrupt(self) -> None:
        self._late = not self.ended
        self._send(signal.SIGINT)

    def end(self) -> None:
        """Kill it, and what it may have left behind."""
        self._late = self._late or not self.ended
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def outcome(self, part: Part) -> Outcome:
        code = 127 if self._process is None else None if self._late else self._process.wait()
        return Outcome(part.name, self.command.name, code, round(self.age, 1))


def run_part(
    part: Part, commands: Iterable[Command], logs: Path, environment: Mapping[str, str], seconds: float
) -> list[Outcome]:
    """Run the commands of a part, `Part.jobs` at a time, and end all of them within ``seconds``.

    Those that no time was left to begin have no outcome.
    """
    waiting, running, outcomes = deque(commands), list[_Process](), list[Outcome]()
    ends = time.monotonic() + seconds - GRACE_SECONDS
    while waiting or running:
        if time.monotonic() > ends:
            _stop(running)
            return outcomes + [process.outcome(part) for process in running]
        while waiting and len(running) < part.jobs:
            command = waiting.popleft()
            running.append(_Process(command, logs / f"{command.name}.log", environment))
        for process in [process for process in running if process.ended or process.age > part.limit]:
            process.end()
            outcomes.append(process.outcome(part))
            running.remove(process)
        time.sleep(_POLL_SECONDS)
    return outcomes


def _stop(running: list[_Process]) -> None:
    for process in running:
        process.interrupt()
    ends = time.monotonic() + GRACE_SECONDS - 1
    while time.monotonic() < ends and not all(process.ended for process in running):
        time.sleep(_POLL_SECONDS)
    for process in running:
        process.end()


def run_parts(
    parts: Iterable[Part],
    logs: Path,
    environment: Mapping[str, str],
    seconds: float,
    before: Iterable[Outcome] = (),
    written: Callable[[list[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """Run parts one after another within ``seconds``, each within its own time or what is left.

    What ended in ``before``, passed or failed, isn't run again.
    ``written`` is called with all outcomes, old and new, before the first and after each part.
    """
    ends = time.monotonic() + seconds
    outcomes = {(one.part, one.command): one for one in before}
    written(list(outcomes.values()))
    for part in parts:
        left = ends - time.monotonic()
        todo = _open([(command, outcomes.get((part.name, command.name))) for command in part.commands])
        if not todo or left < GRACE_SECONDS + _LEAST_SECONDS:
            continue
        for outcome in run_part(part, todo, logs, environment, min(part.seconds, left)):
            outcomes[outcome.part, outcome.command] = outcome
        written(list(outcomes.values()))
    return list(outcomes.values())


def _open(commands: list[tuple[Command, Outcome | None]]) -> list[Command]:
    """Those that haven't ended; behind the others those that ran out of time, which may do so again."""
    late = [command for command, outcome in commands if outcome is not None and outcome.code is None]
    return [command for command, outcome in commands if outcome is None] + late
