"""Fixtures of the integration tests. CLUSTERKV_BIN chooses the build under test (default
build/release/bin); CLUSTERKV_TEST_SLOWDOWN multiplies every bound on time, for sanitizer builds and
loaded machines."""

import os
import sys

import pytest

# Before grpc is loaded: children are started with exec, never forked with gRPC's threads.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
sys.path.insert(0, os.path.dirname(__file__))

from daemon import Daemon, program  # noqa: E402  (needs the path above)


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
