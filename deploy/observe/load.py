"""A load for a daemon: clusterkv-replay over the bundled trace, direct and served, again and again."""

import os
import pathlib
import subprocess
import threading

ROOT = pathlib.Path(__file__).resolve().parents[2]
TRACE = ROOT / "tests" / "traces" / "smollm2-135m-moby-dick.safetensors"


class Load:
    """A context: a loop for each mode, each replay a worker of its own. `steps` are decoded a replay.

    `failures` has what replays said that did not end well.
    """

    def __init__(self, address, programs, steps=64, options=()):
        self.failures, self.rounds = [], {"direct": 0, "served": 0}
        self._address, self._steps, self._options = address, steps, options
        self._program = pathlib.Path(programs) / "clusterkv-replay"
        self._over, self._lock, self._running = threading.Event(), threading.Lock(), {}
        self._threads = [threading.Thread(target=self._run, args=(mode,)) for mode in self.rounds]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        with self._lock:
            for process in self._running.values():
                process.terminate()
        for thread in self._threads:
            thread.join()

    def _run(self, mode):
        environment = {key: value for key, value in os.environ.items()
                       if not key.startswith("CLUSTERKV_")}
        while not self._over.is_set():
            with self._lock:
                if self._over.is_set():
                    return
                process = subprocess.Popen(
                    [self._program, TRACE, "--connect", self._address, "--mode", mode, "--methods",
                     "clusterkv", "--budgets", "128", "--steps", str(self._steps), "--seed",
                     str(self.rounds[mode]), *self._options],
                    stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
                self._running[mode] = process
            told = process.communicate()[1].decode(errors="replace")
            self.rounds[mode] += 1
            if process.returncode != 0 and not self._over.is_set():
                self.failures.append(f"{mode}: exit code {process.returncode}: {told}")
                return
