"""Mutation testing: makes one small wrong at a time in a copy of the repository, and checks that tests notice it.

`python -m contract.mutations` makes all of them; names, or parts of names, choose some.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from billing.storage import embedded
from contract.wrongs import WRONGS, Wrong

ROOT = Path(__file__).parents[1]
LEFT_BEHIND = (
    ".git",
    ".venv*",
    "node_modules",
    "dist",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    ".schemathesis",
)
PATIENCE_SECONDS = 120
BASELINE_SECONDS = 600
TOGETHER = 2
TESTS_FAILED, NO_TESTS_FAILED = 1, 0
# The tests of a broken document do not even start: `tests/conftest.py` cannot be imported.
NOT_STARTED = 4
VOLATILE = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_connections": "200"}


@dataclass(frozen=True)
class Verdict:
    """Whether a wrong was noticed, and how long that took."""

    wrong: Wrong
    is_killed: bool
    seconds: float

    def __str__(self) -> str:
        return f"{'KILLED' if self.is_killed else 'SURVIVED'}  {self.seconds:5.1f} s  {self.wrong.name}"


class Copy:
    """A copy of the repository to be changed, and a PostgreSQL for its tests."""

    def __init__(self, root: Path, state: Path) -> None:
        self._root = root
        self._state = state

    def test(
        self, tests: Sequence[str], *, state: Path | None = None, seconds: float = PATIENCE_SECONDS
    ) -> subprocess.CompletedProcess[str]:
        """Run tests in the copy, until the first that fails."""
        environ = {
            **os.environ,
            # Ahead of the checkout, which is installed in editable mode.
            "PYTHONPATH": str(self._root),
            "PYTHONDONTWRITEBYTECODE": "1",
            "BILLING_TEST_STATE": str(state or self._state),
            "BILLING_TESTS_WITHOUT_BROWSER": "1",
        }
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "--no-header",
            "--tb=line",
            "-p",
            "no:cacheprovider",
        ]
        return subprocess.run(
            [*command, *tests],
            cwd=self._root,
            env=environ,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def judge(self, wrong: Wrong) -> Verdict:
        """Make a wrong, run the tests that should notice, and restore the file."""
        path = self._root / wrong.file
        good, began = path.read_text(), time.monotonic()
        path.write_text(wrong.applied(good))
        try:
            is_killed = self._is_noticed(wrong)
        finally:
            path.write_text(good)
        return Verdict(wrong, is_killed, time.monotonic() - began)

    def _is_noticed(self, wrong: Wrong) -> bool:
        # Migrations run once per cluster, so that a wrong in one needs a new cluster.
        with fresh_state() if "/migrations/" in wrong.file else _same(self._state) as state:
            try:
                done = self.test(wrong.tests, state=state)
            except subprocess.TimeoutExpired:
                return True
        if done.returncode not in (TESTS_FAILED, NO_TESTS_FAILED, NOT_STARTED):
            raise AssertionError(
                f"{wrong.name}: pytest ended with {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done.returncode != NO_TESTS_FAILED


@contextmanager
def copied() -> Iterator[Copy]:
    """A copy of the working tree, and a PostgreSQL that runs as long as the block."""
    with tempfile.TemporaryDirectory(prefix="billing-mutations-") as place, fresh_state() as state:
        root = Path(place) / "repository"
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(*LEFT_BEHIND), symlinks=True)
        with embedded.start(state / "pg", options=VOLATILE):
            yield Copy(root, state)


@contextmanager
def fresh_state() -> Iterator[Path]:
    """A state directory, in memory if possible; passable for all, as root runs PostgreSQL as another user."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    made = Path(tempfile.mkdtemp(prefix="billing-mutations-", dir=memory))
    made.chmod(0o711)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def _same(state: Path) -> Iterator[Path]:
    yield state


def judged(wrongs: Sequence[Wrong], *, together: int = TOGETHER) -> Iterator[Verdict]:
    """The verdicts in the order of the wrongs, `together` of which are judged at a time.

    Raises `AssertionError` if the tests fail without any wrong.
    """
    with ExitStack() as stack:
        copies = SimpleQueue[Copy]()
        for _ in range(together):
            copies.put(stack.enter_context(copied()))
        _require_good(copies, sorted({test for wrong in wrongs for test in wrong.tests}), together)
        pool = stack.enter_context(ThreadPoolExecutor(together))
        yield from pool.map(lambda wrong: _judged_in_one(copies, wrong), wrongs)


def _judged_in_one(copies: SimpleQueue[Copy], wrong: Wrong) -> Verdict:
    copy = copies.get()
    try:
        return copy.judge(wrong)
    finally:
        copies.put(copy)


def _require_good(copies: SimpleQueue[Copy], tests: Sequence[str], together: int) -> None:
    copy = copies.get()
    done = copy.test([*tests, "-n", str(together)], seconds=BASELINE_SECONDS)
    copies.put(copy)
    if done.returncode != NO_TESTS_FAILED:
        raise AssertionError(f"Without any wrong the tests fail:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")


def check() -> str:
    """Judge all wrongs; raises `AssertionError` with those that were not noticed."""
    verdicts = list(judged(WRONGS))
    survivors = [verdict.wrong.name for verdict in verdicts if not verdict.is_killed]
    assert not survivors, f"{len(survivors)} of {len(verdicts)} wrongs survived: {', '.join(survivors)}"
    return f"{len(verdicts)} wrongs, all noticed"


def main(chosen: Sequence[str]) -> int:
    """Return 1 if a wrong survived."""
    wrongs = [wrong for wrong in WRONGS if not chosen or any(part in wrong.name for part in chosen)]
    survived = 0
    for verdict in judged(wrongs):
        print(verdict, flush=True)
        survived += not verdict.is_killed
    print(f"{len(wrongs) - survived} killed, {survived} survived")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
