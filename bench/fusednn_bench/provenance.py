"""Whether a result's sources are those of the commit that it names, where there is a repository to ask."""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from .environment import ROOT, SOURCE_FOLDERS, digest_of

__all__ = ["committed_digest", "source_problems"]


def source_problems(result: Mapping[str, Any], root: Path = ROOT) -> list[str]:
    """What is wrong with the commit of a valid result, in words.  Nothing where there is no repository, or a shallow
    one that lacks the commit: then the file's word has to do.
    """
    commit, digest = result["source"]["commit"], result["source"]["sha256"]
    if _git(root, "rev-parse", "--git-dir") is None:
        return []
    if _git(root, "cat-file", "-e", f"{commit}^{{commit}}") is None:
        shallow = (_git(root, "rev-parse", "--is-shallow-repository") or b"").strip() == b"true"
        return [] if shallow else [f"commit {commit} isn't in this repository"]
    if committed_digest(commit, root) != digest:
        return [f"the sources that ran (SHA-256 {digest[:16]}) aren't those of commit {commit[:12]}"]
    return []


def committed_digest(commit: str, root: Path = ROOT) -> str | None:
    """`environment.source_digest` of a commit."""
    archive = _git(root, "archive", commit)
    if archive is None:
        return None
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        sources = {
            PurePosixPath(member.name): opened.read()
            for member in files
            if member.name.endswith(".py") and (opened := files.extractfile(member)) is not None
        }
    return digest_of(
        (name.as_posix(), sources[name])
        for folder in SOURCE_FOLDERS
        for name in sorted(name for name in sources if name.parts[0] == folder)
    )


def _git(root: Path, *arguments: str) -> bytes | None:
    """What git writes; None where it fails, or isn't there."""
    command = ("git", "-c", "safe.directory=*", "-C", str(root), *arguments)
    try:
        done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
