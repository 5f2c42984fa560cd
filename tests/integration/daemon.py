"""A clusterkvd of a test's own: start, READY line, status over HTTP, stop."""

import http.client
import json
import os
import pathlib
import re
import select
import shutil
import signal
import subprocess
import tempfile
import time

from wire import ROOT

READY = re.compile(r"^READY grpc=(\S+) admin=(127\.0\.0\.1:\d+)\n$")
# Bounds hold for two idle cores; a loaded machine or a sanitizer build multiplies them.
SLOWDOWN = float(os.environ.get("CLUSTERKV_TEST_SLOWDOWN", "1"))
START_SECONDS = 60 * SLOWDOWN
STOP_SECONDS = 30 * SLOWDOWN


def bound(seconds):
    """A time that something may take at most, in seconds, on this machine."""
    return seconds * SLOWDOWN


def program(name):
    """Path of a program under test: $CLUSTERKV_BIN, or the release build."""
    folder = pathlib.Path(os.environ.get("CLUSTERKV_BIN") or ROOT / "build" / "release" / "bin")
    return str((ROOT / folder / name).resolve())


def clean_environment(**more):
    """The environment without our own keys: the daemon refuses those that it does not know."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("CLUSTERKV_")}
    return {**kept, **more}


def scratch(prefix="ckv-"):
    """A folder with a short path (a socket's has 107 bytes), on tmpfs where there is one."""
    shm = "/dev/shm"
    return tempfile.mkdtemp(prefix=prefix, dir=shm if os.access(shm, os.W_OK) else None)


def run_to_end(flags, timeout=START_SECONDS, **environment):
    """Runs a clusterkvd that should not come up: (exit code, stdout, stderr)."""
    done = subprocess.run([program("clusterkvd"), *flags], env=clean_environment(**environment),
                          capture_output=True, text=True, timeout=timeout, check=False)
    return done.returncode, done.stdout, done.stderr


class Daemon:
    """One process. `flags` are added to a small host-backend configuration, or replace its keys.

    stop() is part of a test: it asserts exit code 0, which a sanitizer's finding would break.
    """

    def __init__(self, flags=None, folder=None, environment=None):
        self.folder = folder or scratch()
        self._owns_folder = folder is None
        self.settings = {
            "listen": f"unix:{self.folder}/s.sock",
            "admin-listen": "127.0.0.1:0",
            "host-memory": "64mb",
            "host-chunk": "4mb",
            "host-memory-dir": f"{self.folder}/kv",
            "backend": "host",
            "log-format": "json",
            "log-level": "debug",
        }
        self.settings.update(flags or {})
        self.log_path = os.path.join(self.folder, f"daemon-{time.monotonic_ns()}.log")
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                [program("clusterkvd"), *self.flags()], stdout=subprocess.PIPE, stderr=log,
                env=clean_environment(**(environment or {})))
        self.ready_line = self._read_ready()
        found = READY.match(self.ready_line)
        assert found, f"no READY line but {self.ready_line!r}; log:\n{self.log()}"
        self.address, self.admin = found.groups()

    def flags(self):
        return [f"--{key}={value}" for key, value in self.settings.items() if value is not None]

    def _read_ready(self):
        deadline = time.monotonic() + START_SECONDS
        pipe, line = self.process.stdout.fileno(), b""
        while not line.endswith(b"\n") and time.monotonic() < deadline:
            if not select.select([pipe], [], [], 0.1)[0]:
                continue
            byte = os.read(pipe, 1)
            if not byte:
                break
            line += byte
        return line.decode()

    @property
    def pid(self):
        return self.process.pid

    @property
    def socket_path(self):
        return self.address.removeprefix("unix:")

    @property
    def attach_path(self):
        return self.settings.get("attach-path") or self.socket_path + ".attach"

    def log(self):
        with open(self.log_path, encoding="utf-8", errors="replace") as log:
            return log.read()

    def records(self):
        """The log, one dict a line."""
        return [json.loads(line) for line in self.log().splitlines()]

    def http(self, path, method="GET", timeout=bound(5)):
        """(status, headers, body text) of the admin port."""
        host, port = self.admin.split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=timeout)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read().decode()
        finally:
            connection.close()

    def status(self):
        code, _, body = self.http("/status")
        assert code == 200, body
        return json.loads(body)

    def metrics(self):
        """{series with its labels: value} of /metrics."""
        code, _, body = self.http("/metrics")
        assert code == 200, body
        pairs = (line.rsplit(" ", 1) for line in body.splitlines() if line and line[0] != "#")
        return {series: float(value) for series, value in pairs}

    def steady(self):
        """All of /status and /metrics that requests alone change, at once: no clocks, no process
        figures, no counts of calls, nothing that is sampled once a second."""
        status = self.status()
        for name in ("uptime_seconds", "device_age_seconds", "recent_errors"):
            status.pop(name)
        status["counters"].pop("cluster_seconds")
        for session in status["session_list"]:
            session.pop("age_seconds")
        metrics = {series: value for series, value in self.metrics().items()
                   if not series.startswith((
                       "process_", "grpc_server_", "clusterkv_thread_", "clusterkv_refused_total",
                       "clusterkv_waiting_calls",
                       "clusterkv_host_pool_extent", "clusterkv_host_pool_largest",
                       "clusterkv_decode_steps", "clusterkv_cache_bytes{"))
                   and "_evicted_" not in series
                   and not re.search("_seconds(_total|_sum|_bucket)?(\\{|$)", series)}
        return status, metrics

    def held(self):
        """What is held of the daemon: all 0 once nobody is there."""
        status = self.status()
        host = status["host_bytes"]
        return {"sessions": status["sessions"], "sequences": status["sequences"],
                "used": host["used"], "reserved": host["reserved"],
                "quarantined": host["quarantined"], "gpu": status["gpu_bytes"]["used"]}

    def wait_until_free(self, seconds=5):
        """Asserts that all is given back in time; returns how long it took, in seconds."""
        started = time.monotonic()
        while any(self.held().values()):
            assert time.monotonic() - started < bound(seconds), f"still held: {self.held()}"
            time.sleep(0.02)
        return time.monotonic() - started

    def signal(self, number):
        self.process.send_signal(number)

    def wait(self, seconds=STOP_SECONDS):
        code = self.process.wait(seconds)
        self.process.stdout.close()
        return code

    def stop(self):
        """SIGTERM; asserts exit code 0. Does nothing if it has ended already."""
        try:
            if self.process.poll() is None:
                self.signal(signal.SIGTERM)
                code = self.wait()
                assert code == 0, f"exit code {code}; log:\n{self.log()[-4000:]}"
        finally:
            self.discard()

    def kill(self):
        self.signal(signal.SIGKILL)
        return self.wait()

    def discard(self):
        """Ends the process if it still runs, and removes the folder."""
        if self.process.poll() is None:
            self.kill()
        if self._owns_folder:
            shutil.rmtree(self.folder, ignore_errors=True)
