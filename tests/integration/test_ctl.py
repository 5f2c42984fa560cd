"""clusterkvctl top and doctor against a real daemon, in a pipe and on a terminal."""

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time

import pytest

from daemon import bound, clean_environment, program
from dense import Kv, method_of, shape_of
from worker import SERVED, Worker

ENTER, LEAVE = b"\x1b[?1049h\x1b[?25l", b"\x1b[?25h\x1b[?1049l"


def ctl(daemon, *arguments, code=0):
    """stdout of a clusterkvctl that ends with `code`."""
    done = subprocess.run([program("clusterkvctl"), "--address", daemon.address, *arguments],
                          env=clean_environment(), capture_output=True, text=True,
                          timeout=bound(60), check=False)
    assert done.returncode == code, done
    return done.stdout


class Terminal:
    """clusterkvctl top with a terminal of 100 x 30 of its own."""

    def __init__(self, daemon, *arguments, **environment):
        self.main, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        self.modes = termios.tcgetattr(child)
        self.child = child
        self.output = b""
        self.process = subprocess.Popen(
            ["setsid", "--ctty", program("clusterkvctl"), "--address", daemon.address, "top",
             *arguments], stdin=child, stdout=child, stderr=child,
            env=clean_environment(**{"TERM": "xterm", **environment}))

    def read_until(self, fact, what):
        deadline = time.monotonic() + bound(20)
        while not fact(self.output):
            assert time.monotonic() < deadline, (what, self.output)
            if select.select([self.main], [], [], 0.1)[0]:
                self.output += os.read(self.main, 65536)

    def end(self):
        """Waits for the process; reads what is left; its exit code."""
        deadline = time.monotonic() + bound(20)
        while self.process.poll() is None:
            assert time.monotonic() < deadline, "it does not end"
            if select.select([self.main], [], [], 0.05)[0]:
                self.output += os.read(self.main, 65536)
        while select.select([self.main], [], [], 0)[0]:
            self.output += os.read(self.main, 65536)
        return self.process.returncode

    def restored(self):
        """The screen and the keyboard are as they were before."""
        return (self.output.startswith(ENTER) and self.output.endswith(LEAVE) and
                self.output.count(ENTER) == self.output.count(LEAVE) and
                termios.tcgetattr(self.child) == self.modes)

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.main)
        os.close(self.child)


@pytest.fixture
def terminal():
    """terminal(daemon, arguments..., NAME=VALUE) is a Terminal."""
    opened = []

    def start(*arguments, **environment):
        opened.append(Terminal(*arguments, **environment))
        return opened[-1]
    yield start
    for one in opened:
        one.close()


def test_top_tells_rates_from_differences(daemon):
    with Worker(daemon.address, "evil\x1b[2Jname") as worker:
        kv = Kv(shape_of(), 500)
        ring = worker.allocate_ring(1 << 20)
        sequence = worker.register(kv.shape, method_of(), 500, SERVED)
        with subprocess.Popen([program("clusterkvctl"), "--address", daemon.address, "top",
                               "--interval", "0.5", "-n", "3", "--format", "json"],
                              env=clean_environment(), stdout=subprocess.PIPE, text=True) as top:
            first = json.loads(top.stdout.readline())
            worker.ingest(sequence, ring, kv, 400)
            worker.wait(sequence)
            for position in range(400, 410):
                for layer in range(kv.shape.layers):
                    worker.fetch(sequence, kv, position, layer)
            second = json.loads(top.stdout.readline())
            third = json.loads(top.stdout.readline())
            assert top.wait(bound(20)) == 0
        assert first["rates"] is None and first["counters"]["ingested_tokens"] == 0
        ticks = [second, third]
        tokens = sum(tick["rates"]["ingested_tokens_per_second"] * tick["rates"]["seconds"]
                     for tick in ticks)
        assert round(tokens) == third["counters"]["ingested_tokens"] > 0
        served = third["counters"]["served"]
        clusters = sum(tick["rates"]["served"]["clusters_per_second"] * tick["rates"]["seconds"]
                       for tick in ticks)
        assert round(clusters) == served["hit_clusters"] + served["missed_clusters"] > 0
        assert all(tick["rates"]["direct"]["hit_rate"] is None for tick in ticks)
        assert third["session_list"][0]["client_name"] == "evil\x1b[2Jname"
        # For people, in a pipe: no escapes, not even a client's.
        text = ctl(daemon, "top", "--interval", "0.2", "--iterations", "2")
        assert text.count("clusterkvd ") == 2 and "\n\nclusterkvd " in text
        assert "evil?[2Jname" in text and "\x1b" not in text
        assert "\x1b" not in ctl(daemon, "sessions")


def test_top_gives_the_terminal_back(daemon, terminal):
    for leave in (b"q", b"\x03"):  # a key, Ctrl-C
        top = terminal(daemon, "--interval", "0.2")
        top.read_until(lambda output: output.count(b"\x1b[H") >= 3, "no three frames")
        assert b"\x1b[32mready" in top.output and b"\x1b[2J" not in top.output  # never blank
        os.write(top.main, leave)
        assert top.end() == 0 and top.restored(), top.output
    for number in (signal.SIGTERM, signal.SIGINT):
        top = terminal(daemon, "--interval", "60")
        top.read_until(lambda output: b"ready" in output, "no frame")
        top.process.send_signal(number)
        assert top.end() == 0 and top.restored(), top.output


def test_top_stops_and_goes_on_and_takes_a_new_size(daemon, terminal):
    top = terminal(daemon, "--interval", "60")
    top.read_until(lambda output: b"SESSION" in output, "no frame")
    fcntl.ioctl(top.child, termios.TIOCSWINSZ, struct.pack("HHHH", 2, 20, 0, 0))
    top.read_until(lambda output: output.count(b"\x1b[H") == 2, "no frame of the new size")
    small = top.output.split(b"\x1b[H")[-1]
    assert small.count(b"\r\n") == 1 and b"SESSION" not in small
    os.write(top.main, b"\x1a")  # Ctrl-Z
    pid, status = os.waitpid(top.process.pid, os.WUNTRACED)
    assert pid == top.process.pid and os.WIFSTOPPED(status)
    top.read_until(lambda output: output.endswith(LEAVE), "the screen is not given back")
    assert termios.tcgetattr(top.child) == top.modes
    top.process.send_signal(signal.SIGCONT)
    top.read_until(lambda output: output.count(ENTER) == 2, "it does not go on")
    os.write(top.main, b"q")
    assert top.end() == 0 and top.restored()


def test_top_knows_no_color_and_dumb_terminals(daemon, terminal):
    top = terminal(daemon, "-n", "1", NO_COLOR="1")
    assert top.end() == 0
    assert b"ready" in top.output and b"\x1b[3" not in top.output and b"\x1b[1m" not in top.output
    top = terminal(daemon, "-n", "1", TERM="dumb")
    assert top.end() == 0 and b"ready" in top.output and b"\x1b" not in top.output


def test_top_waits_for_a_daemon_that_has_gone(start_daemon):
    daemon = start_daemon()
    with subprocess.Popen([program("clusterkvctl"), "--address", daemon.address, "top",
                           "--interval", "0.2", "-n", "4", "--format", "json", "--timeout", "2"],
                          env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as top:
        assert json.loads(top.stdout.readline())["ready"] is True
        daemon.stop()
        rest = [json.loads(line) for line in top.stdout]
        assert top.wait(bound(20)) == 3
        assert "error" in rest[-1] and len(rest) == 3
        assert "GetStatus" in top.stderr.read()
    assert ctl(daemon, "top", "-n", "1", code=3) == ""


@pytest.mark.parametrize("flags", [["--interval", "0"], ["--iterations", "-1"], ["--color"]])
def test_top_refuses_bad_options(daemon, flags):
    ctl(daemon, "top", *flags, code=2)


# --- doctor -------------------------------------------------------------------------------------

def diagnosis(daemon, *arguments, code):
    found = json.loads(ctl(daemon, "doctor", "--format", "json", *arguments, code=code))
    counted = {kind: found[kind] for kind in ("ok", "warn", "fail", "skip")}
    assert sum(counted.values()) == len(found["checks"]) == 12
    return {check["name"]: check for check in found["checks"]}


def test_doctor_finds_the_daemon_and_its_sockets(daemon):
    checks = diagnosis(daemon, "--host-memory-dir", daemon.settings["host-memory-dir"],
                       code=0 if not os.path.exists("/dev/nvidiactl") else 1)
    for name in ("daemon", "gRPC socket", "attach socket"):
        assert checks[name]["verdict"] == "ok", checks[name]
    assert "0660" in checks["gRPC socket"]["found"]
    assert checks["host memory"]["verdict"] in ("ok", "warn")
    assert f"pid {daemon.pid}" in checks["memlock"]["found"]


def test_doctor_says_what_to_do_without_a_daemon(start_daemon):
    daemon = start_daemon()
    daemon.stop()
    checks = diagnosis(daemon, code=1)
    for name in ("daemon", "gRPC socket", "attach socket"):
        assert checks[name]["verdict"] == "fail" and checks[name]["advice"], checks[name]
    table = ctl(daemon, "doctor", code=1)
    assert "fail  gRPC socket" in table and "-> " in table and "\x1b" not in table
    checks = diagnosis(daemon, "--preflight", "--host-memory", "1mb", code=0)
    assert checks["daemon"]["verdict"] == "skip"


def test_doctor_knows_too_much_memory(daemon):
    checks = diagnosis(daemon, "--host-memory-dir", "/dev/shm/clusterkv", "--host-memory", "90tb",
                       code=1)
    assert checks["host memory"]["verdict"] == "fail"
    assert "90.0 TiB are wanted" in checks["host memory"]["found"]
