"""Starts other worker processes: child_worker.py at a phase, and clusterkv-replay."""

import os
import pathlib
import signal
import subprocess
import sys

from daemon import clean_environment, program
from wire import ROOT, STUBS_VARIABLE

HERE = pathlib.Path(__file__).resolve().parent


class Child:
    """child_worker.py, already at its phase. Ends with the context, by SIGKILL."""

    def __init__(self, address, phase, prefix=()):
        environment = clean_environment(**{STUBS_VARIABLE: os.environ[STUBS_VARIABLE]})
        self.process = subprocess.Popen(
            [*prefix, sys.executable, str(HERE / "child_worker.py"), address, phase],
            stdout=subprocess.PIPE, env=environment, text=True)
        line = self.process.stdout.readline()
        assert line == f"at {phase}\n", f"the child said {line!r}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def kill(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)
        self.process.stdout.close()


def make_trace(path, **options):
    """A small random trace by tests/reference/make_trace.py."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    subprocess.run([sys.executable, str(ROOT / "tests" / "reference" / "make_trace.py"), str(path),
                    *flags], check=True)
    return str(path)


def start_replay(address, trace, *flags):
    """clusterkv-replay, clusterkv alone, JSON on stdout."""
    return subprocess.Popen(
        [program("clusterkv-replay"), trace, "--connect", address, "--methods", "clusterkv",
         "--format", "json", *map(str, flags)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment(), text=True)
