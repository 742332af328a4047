"""Confined: another Python process that the system lets have so much memory and no more."""

import json
import os
import resource
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from workbench.errors import BudgetError

GROUPS = Path("/sys/fs/cgroup")


class Fence(NamedTuple):
    """How a limit is kept. `peak` reads the most that was held, in bytes; None where the system does not say."""

    kind: str
    group: Path | None
    limit: int

    def enter(self) -> None:
        """In the child, before it becomes Python."""
        if self.group is not None:
            (self.group / "cgroup.procs").write_text(str(os.getpid()))
        else:
            resource.setrlimit(resource.RLIMIT_DATA, (self.limit, self.limit))

    @property
    def peak(self) -> int | None:
        for name in ("memory.max_usage_in_bytes", "memory.peak"):
            if self.group is not None and (self.group / name).is_file():
                return int((self.group / name).read_text())
        return None


@contextmanager
def fence(limit: int) -> Iterator[Fence]:
    """A memory control group where one can be made (Linux, with the right to), else a limit on private memory
    (RLIMIT_DATA). A group counts what the process holds and what the system caches for it; it kills what passes it.
    """
    for root, name in ((GROUPS / "memory", "memory.limit_in_bytes"), (GROUPS, "memory.max")):
        group = root / f"workbench-{secrets.token_hex(4)}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if not (group / name).is_file():
                continue
            (group / name).write_text(str(limit))
            yield Fence(f"cgroup {name}", group, limit)
            return
        finally:
            group.rmdir()
    yield Fence("RLIMIT_DATA", None, limit)


def run(module: str, question: dict, limit: int, **surroundings: str) -> tuple[dict, dict]:
    """`python -m module`, with the question as JSON on its input: what it answers as JSON in its last line, and how it
    was kept. `surroundings` are environment variables. BudgetError where it was killed or failed.
    """
    with fence(limit) as kept:
        command = [sys.executable, "-m", module]
        surroundings = os.environ | surroundings
        done = subprocess.run(
            command, input=json.dumps(question), capture_output=True, text=True, preexec_fn=kept.enter, env=surroundings
        )
        about = {"fence": kept.kind, "limit": limit, "peak": kept.peak}
    if done.returncode:
        last = " ".join(done.stderr.split()[-60:])
        raise BudgetError(f"within {limit / 1e9:,.1f} GB ({kept.kind}) it ended with status {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1]), about
