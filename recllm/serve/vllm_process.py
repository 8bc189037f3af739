"""The process of vLLM's server: started, watched and stopped by its own id and process group.

A command and an environment enter; a running child leaves, whose group is gone when `stop` returns.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

STOP_S = 15  # for vLLM to stop by itself
LAST_LINES = 15
ON_STDERR = "-"


def free_port(host: str) -> int:
    """A port of the host that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


class VllmProcess:
    """A child in a session of its own, so that a terminal's Ctrl-C and this process's signals do not reach it.

    Args:
        command, environment: of the child.
        log: file for its output; None: a temporary one; "-": this process's standard error.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: str | None = None) -> None:
        self.log = None if log == ON_STDERR else _log_file(log)
        output = sys.stderr if self.log is None else self.log.open("ab")
        try:
            self._process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.PIPE,  # ends with this process: then the child ends
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        finally:
            if self.log is not None:
                output.close()

    @property
    def pid(self) -> int:
        """Its id, which is that of its group too."""
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.poll()

    def describe_end(self) -> str:
        """What is known of an end that nobody asked for."""
        status = self.exit_status
        how = f"signal {-status}" if status is not None and status < 0 else f"status {status}"
        lines = self.last_lines()
        return f"vLLM ended with {how}" + (f". Its last lines, of {self.log}:\n{lines}" if lines else "")

    def last_lines(self) -> str:
        """The end of its log; empty where it has none of its own."""
        if self.log is None or not self.log.is_file():
            return ""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - (16 << 10)))
            text = file.read().decode(errors="replace")
        return "\n".join(f"  {line[:300]}" for line in text.splitlines()[-LAST_LINES:])

    def stop(self, bound_s: float = STOP_S) -> None:
        """End it and all that it started: first as vLLM stops by itself, after the bound by force."""
        if self.exit_status is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(bound_s)
        self._kill_group()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _kill_group(self, bound_s: float = 5) -> None:
        """What is left of the group; the id cannot have become another's while one of it lives."""
        until = time.monotonic() + bound_s
        with contextlib.suppress(ProcessLookupError, PermissionError):
            while time.monotonic() < until:
                os.killpg(self.pid, signal.SIGKILL)
                self._process.poll()
                time.sleep(0.05)


def _log_file(log: str | None) -> Path:
    if log is not None:
        return Path(log)
    handle, name = tempfile.mkstemp(prefix="recllm-vllm-", suffix=".log")
    os.close(handle)
    return Path(name)
