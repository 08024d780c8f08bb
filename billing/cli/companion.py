"""The `billing worker` beside `billing serve`."""

from __future__ import annotations

import subprocess
import sys
import threading
from types import TracebackType
from typing import Self

import structlog

# A task may call Stripe twice, for eight seconds each.
END_SECONDS = 20
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0

# Runs `billing` from the same code as ours; `python -m` would prefer what is in the working directory.
AS_WE_ARE = f"import sys; sys.path[:] = {sys.path}; from billing.cli import main; main(prog_name='billing')"

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("billing.worker")


class Companion:
    """A `billing worker` that runs as long as the block, and is restarted if it ends earlier."""

    def __init__(self) -> None:
        self._stopping = threading.Event()
        # Set when the running worker is told to end. It also ends the pause before the next is started.
        self._told = threading.Event()
        # Held while a worker is started: when the block ends, it is either known or never started.
        self._starting = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher = threading.Thread(target=self._keep_running, daemon=True)

    def __enter__(self) -> Self:
        self._watcher.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        with self._starting:
            self._stopping.set()
            self._tell_to_end()
        self._watcher.join(END_SECONDS)
        if self._process is not None:
            self._process.kill()

    def renew(self) -> None:
        """Have the worker finish what is in flight and end, and start another with the current code."""
        with self._starting:
            self._tell_to_end()

    def _tell_to_end(self) -> None:
        self._told.set()
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def _keep_running(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while not self._stopping.is_set():
            try:
                details: dict[str, object] = {"exit_code": self._run()}
            except OSError as error:  # As when there is no memory for another process.
                details = {"cause": error.strerror}
            if not self._told.is_set():
                log.error("the worker ended, and is started again", **details)
            was_told = self._told.wait(pause)
            pause = FIRST_PAUSE_SECONDS if was_told else min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _run(self) -> int | None:
        process = self._start()
        return None if process is None else process.wait()

    def _start(self) -> subprocess.Popen[bytes] | None:
        with self._starting:
            if self._stopping.is_set():
                return None
            self._told.clear()
            command = [sys.executable, "-P", "-c", AS_WE_ARE, "worker", "--while-stdin-is-open"]
            # In a process group of its own, which Ctrl-C does not reach: it works on until our requests have finished.
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0)
            return self._process
