"""Stops one thread of another process and lets the rest run: what a driver call that never returns
looks like from outside, with nothing in the program for it."""

import ctypes
import os
import pathlib
import time

SEIZE, INTERRUPT, DETACH = 0x4206, 0x4207, 17  # ptrace(2)
ALL_CHILDREN = 0x40000000  # __WALL: threads, too

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request, thread):
    if _libc.ptrace(request, thread, None, None) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace {request:#x} of {thread}: {os.strerror(number)}")


def thread_of(pid, name):
    tasks = pathlib.Path(f"/proc/{pid}/task")
    found = [int(task.name) for task in tasks.iterdir()
             if (task / "comm").read_text().strip() == name]
    assert len(found) == 1, (name, found)
    return found[0]


class StoppedThread:
    """A context, to be entered and left by one thread. It is stopped where it sleeps, so that it holds
    no lock of the allocator's."""

    def __init__(self, pid, name):
        self.thread = thread_of(pid, name)
        self._stat = pathlib.Path(f"/proc/{pid}/task/{self.thread}/stat")

    def __enter__(self):
        _ptrace(SEIZE, self.thread)
        while self._stat.read_text().rsplit(")", 1)[1].split()[0] != "S":
            time.sleep(0.001)
        _ptrace(INTERRUPT, self.thread)
        os.waitpid(self.thread, ALL_CHILDREN)
        return self

    def __exit__(self, *_):
        _ptrace(DETACH, self.thread)
