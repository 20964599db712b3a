"""Processes that have imported torch already: forks of one that has, as four seconds for each of some hundred would be
most of the suite's time.

They are real processes all the same, children of this one. What a new interpreter does is for those tests to prove that
start one, by `subprocess` or the fixture `new_interpreters`.
"""

import atexit
import ctypes
import fcntl
import gc
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from functools import cache

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_HIGH = 1000
"""Descriptors from here on are nobody's."""
_one_at_a_time = threading.Lock()


class Process:
    """A process that runs `code`, with as much of `subprocess.Popen` as its users need."""

    def __init__(self, code, descriptors, arguments=(), cwd=None, new_session=False):
        """`descriptors`: what each descriptor of the new process is here."""
        request = (code, list(descriptors), list(arguments), cwd or os.getcwd(), dict(os.environ), new_session)
        with _one_at_a_time:
            connection = server()
            # The fork's own parent ends at once, and the fork becomes a child of the next process that takes orphans.
            _take_orphans(True)
            try:
                socket.send_fds(connection, [pickle.dumps(request)], list(descriptors.values()))
                self.pid = int(connection.recv(64))
                assert connection.recv(64) == b"left alone"
            finally:
                _take_orphans(False)
        self.returncode = None

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout=float("inf")):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a fork", timeout)
            time.sleep(0.002)
        return self.returncode


def start_child(code, descriptor):
    """What `autobatch.child` starts, from here."""
    null = os.open(os.devnull, os.O_RDWR)
    try:
        return Process(code, {0: null, 1: null, 2: null, descriptor: descriptor}, new_session=True)
    finally:
        os.close(null)


def run(code, *arguments, cwd=None):
    """Run code to its end, as `subprocess.run` does with its output captured as text."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(os.devnull) as null:
        process = Process(code, {0: null.fileno(), 1: out.fileno(), 2: err.fileno()}, arguments, cwd)
        try:
            process.wait(timeout=150)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            raise
        texts = [(file.seek(0), file.read().decode())[1] for file in (out, err)]
    return subprocess.CompletedProcess(arguments, process.returncode, *texts)


def _take_orphans(wanted):
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0)


@cache
def server():
    """Our end of the socket to the process that is forked. That ends when this one does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, __file__, str(theirs.fileno())]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)
    theirs.close()
    atexit.register(lambda: (ours.close(), process.wait()))
    return ours


def _serve(connection):
    """Answer each request with a fork, in which this returns the code to run."""
    while True:
        message, descriptors, *_ = socket.recv_fds(connection, 1 << 20, 16)
        if not message:
            sys.exit()
        between = os.fork()
        if between == 0:
            between = os.getpid()
            if pid := os.fork():
                connection.send(str(pid).encode())
                os._exit(0)
            while os.getppid() == between:
                time.sleep(0.0005)
            os.close(connection.detach())
            return _become(*pickle.loads(message), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        os.waitpid(between, 0)
        connection.send(b"left alone")


def _become(code, numbers, arguments, cwd, environment, new_session, descriptors):
    """Make this fork what `python -c code` would be."""
    aside = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, _HIGH) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for descriptor, number in zip(aside, numbers, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    if new_session:
        os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:], sys.path[0] = ["-c", *arguments], ""
    sys.modules["__main__"] = types.ModuleType("__main__")
    return code


def _finish(code):
    """Run it, and end without taking down all that was imported, which takes a second."""
    status = 0
    try:
        exec(compile(code, "<string>", "exec"), vars(sys.modules["__main__"]))
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:  # noqa: BLE001  # told as Python itself would
        traceback.print_exc()
        status = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    import torch._dynamo  # noqa: F401  # whatever makes an optimizer or a fake tensor needs it

    import autobatch.cli
    import autobatch.devices.oom
    import autobatch.devices.trial_server
    import autobatch.fitting
    import autobatch.prediction.stand_in
    import autobatch.prediction.tracer  # noqa: F401

    gc.freeze()
    _finish(_serve(socket.socket(fileno=int(sys.argv[1]))))
