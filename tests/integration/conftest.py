"""Fixtures of the integration tests. CLUSTERKV_BIN chooses the build under test (default
build/release/bin); CLUSTERKV_TEST_SLOWDOWN multiplies every bound on time, for sanitizer builds and
loaded machines."""

import os
import shutil
import sys

import pytest

# Before grpc is loaded: children are started with exec, never forked with gRPC's threads.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
sys.path.insert(0, os.path.dirname(__file__))

from daemon import Daemon, program, scratch  # noqa: E402  (needs the path above)
from fake_kubelet import Kubelet  # noqa: E402


def pytest_report_header(config):
    del config
    return f"clusterkvd: {program('clusterkvd')}"


@pytest.fixture
def start_daemon():
    """start(flags={}) gives a Daemon; all are stopped at the end, each with exit code 0."""
    started = []

    def start(flags=None, **more):
        started.append(Daemon(flags, **more))
        return started[-1]
    try:
        yield start
    except BaseException:
        for daemon in started:
            daemon.discard()
        raise
    failures = []
    for daemon in reversed(started):
        try:
            daemon.stop()
        except (AssertionError, OSError) as error:
            failures.append(error)
    assert not failures, failures


@pytest.fixture
def daemon(start_daemon):
    return start_daemon()


@pytest.fixture
def node(tmp_path):
    """Folders of a node. The pool lies on the disk: only what is written takes memory."""
    folder = scratch()
    os.mkdir(f"{folder}/plugins")
    yield {"device-plugin": "true", "device-plugin-dir": f"{folder}/plugins",
           "grants-dir": f"{folder}/grants", "host-memory": "3gb", "host-chunk": "64mb",
           "host-memory-dir": f"{tmp_path}/kv"}
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def kubelet(node):
    made = Kubelet(node["device-plugin-dir"]).start()
    yield made
    if made.server is not None:
        made.stop()
