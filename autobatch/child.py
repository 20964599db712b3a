"""A Python process of our own beside the caller's, and the pipe to it."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from typing import BinaryIO

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Child:
    """A new Python process that runs `main(descriptor, parent)` of a module, with the caller's `sys.path`.

    `descriptor` is its end of the pipe, and `parent` this process's id. What it prints goes nowhere.
    """

    def __init__(self, module: str) -> None:
        ours, theirs = socket.socketpair()
        code = (
            f"import sys; sys.path[:] = {json.dumps([p for p in sys.path if isinstance(p, str)])}\n"
            f"from {module} import main; main({theirs.fileno()}, {os.getpid()})"
        )
        self._process = _start(code, theirs.fileno())
        theirs.close()
        self._socket = ours
        self._status: int | None = None
        self.reader: BinaryIO = ours.makefile("rb")
        self.writer: BinaryIO = ours.makefile("wb")

    def wait_for_an_answer(self) -> None:
        """Wait until there is something to read, also that the child has ended: what it started may keep the pipe open.

        Raises:
            EOFError: it has ended without a word.
        """
        while not select.select([self._socket], [], [], 1)[0]:
            if self._process.poll() is not None and not select.select([self._socket], [], [], 0)[0]:
                raise EOFError

    def close(self, failed: bool = False) -> int:
        """End the child, and what it has started. Returns its status, negative for a signal.

        Args:
            failed: it seems to have ended by itself; its own status is waited for.
        """
        if self._status is not None:
            return self._status  # its number may be another process's by now
        for stream in (self.writer, self._socket):
            with suppress(OSError):  # what it could not be told any more
                stream.close()
        status = self._process.poll()
        if status is None and failed:
            with suppress(subprocess.TimeoutExpired):  # it may be on its way, with a status that says why
                status = self._process.wait(timeout=2)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(OSError):
            self.reader.close()
        self._status = self._process.wait() if status is None else status
        return self._status


def _start(code: str, descriptor: int) -> subprocess.Popen[bytes]:
    # In a session of its own, so that Ctrl-C reaches only the caller, which then ends the child.
    return subprocess.Popen(
        [sys.executable, "-c", code],
        pass_fds=[descriptor],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however it ends. Only Linux can; elsewhere the pipe's end
    has to do."""
    prctl = getattr(ctypes.CDLL(None, use_errno=True), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was told
        os._exit(1)


def pipe_from(descriptor: int) -> tuple[BinaryIO, BinaryIO]:
    """The child's end of the pipe: what it reads from, and what it writes to."""
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)  # what the child starts must not keep the conversation open
    return connection.makefile("rb"), connection.makefile("wb")
