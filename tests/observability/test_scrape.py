"""/metrics is cheap with many sequences, and answers whatever is stuck."""

import statistics
import time

import pytest

from daemon import Daemon, bound
from dense import method_of, shape_of
from stopped_thread import StoppedThread
from wire import v1
from worker import DIRECT, SERVED, Worker

SEQUENCES = 1000
SCRAPE_SECONDS = 0.005


@pytest.fixture(name="daemon")
def daemon_with_room():
    daemon = Daemon({"host-memory": "256mb", "max-sequences-per-session": "2000",
                     "log-level": "warning"})
    try:
        yield daemon
        daemon.stop()
    finally:
        daemon.discard()


def private_bytes(daemon):
    """Of the process: what it has allocated, without files and shared memory."""
    with open(f"/proc/{daemon.pid}/status", encoding="utf-8") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def scrape_seconds(daemon, times):
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        code, _, body = daemon.http("/metrics")
        taken.append(time.perf_counter() - started)
        assert code == 200 and body
    return statistics.median(taken)


def test_a_scrape_costs_the_same_with_a_thousand_sequences(daemon):
    with Worker(daemon.address) as worker:
        for mode in (DIRECT, SERVED):
            worker.register(shape_of(), method_of(), 64, mode)
        few = daemon.metrics()
        for _ in range(SEQUENCES - 2):
            worker.register(shape_of(), method_of(), 64, SERVED)
        many = daemon.metrics()
        assert many["clusterkv_sequences"] == SEQUENCES
        assert few.keys() == many.keys(), "series for sequences"
        scrape_seconds(daemon, 100)
        before = private_bytes(daemon)
        median = scrape_seconds(daemon, 400)
        assert median < bound(SCRAPE_SECONDS), f"{median * 1000:.2f} ms"
        grown = private_bytes(daemon) - before
        assert grown < 1 << 20, f"{grown} bytes more after 400 scrapes"


def test_metrics_answer_while_threads_are_stuck():
    """The device's thread of one daemon, the core of another."""
    device, core = Daemon(), Daemon()
    try:
        with Worker(device.address), Worker(core.address):
            with StoppedThread(device.pid, "memory"), StoppedThread(core.pid, "ckv-core"):
                deadline = time.monotonic() + bound(20)
                while not all("for 1" in daemon.status()["not_ready_reason"]
                              for daemon in (device, core)):
                    assert time.monotonic() < deadline, (device.status(), core.status())
                    for daemon in (device, core):
                        assert scrape_seconds(daemon, 3) < bound(0.5)
                    time.sleep(0.5)
                metrics = device.metrics()
                assert metrics["clusterkv_ready"] == 0 and device.http("/readyz")[0] == 503
                assert metrics["clusterkv_device_age_seconds"] > 10
                assert metrics['clusterkv_thread_task_age_seconds{thread="memory"}'] > 8
                assert metrics["clusterkv_tick_age_seconds"] < bound(3)
                metrics = core.metrics()
                assert metrics["clusterkv_ready"] == 0 and core.http("/readyz")[0] == 503
                assert metrics["clusterkv_tick_age_seconds"] > 10
                assert metrics['clusterkv_thread_waiting_tasks{thread="core"}'] > 5
                assert core.http("/livez")[0] == 200
            deadline = time.monotonic() + bound(10)
            while not (device.status()["ready"] and core.status()["ready"]):
                assert time.monotonic() < deadline, "they do not recover"
                time.sleep(0.1)
        device.stop()
        core.stop()
    finally:
        device.discard()
        core.discard()


def test_calls_are_counted_by_method_and_code(daemon):
    labels = 'grpc_method="{}",grpc_service="clusterkv.v1.ClusterKv",grpc_type="{}"'

    def handled(method, code, kind="unary"):
        return daemon.metrics()["grpc_server_handled_total{grpc_code=\"%s\",%s}"
                                % (code, labels.format(method, kind))]
    with Worker(daemon.address) as worker:
        sequence = worker.register(shape_of(), method_of(), 64, SERVED)
        worker.stub.GetStatus(v1.GetStatusRequest())
        refused = v1.ReleaseSequenceRequest(session=worker.ref, sequence_id=sequence.id + 1)
        with pytest.raises(Exception, match="has no sequence"):
            worker.stub.ReleaseSequence(refused)
        assert handled("RegisterSequence", "OK") == 1
        assert handled("GetStatus", "OK") == 1
        assert handled("ReleaseSequence", "NotFound") == 1
        assert handled("ReleaseSequence", "OK") == 0
        stream = labels.format("Session", "bidi_stream")
        assert daemon.metrics()[f"grpc_server_started_total{{{stream}}}"] == 1
        assert daemon.metrics()[f"grpc_server_handling_seconds_count{{{stream}}}"] == 0
    deadline = time.monotonic() + bound(5)
    while daemon.metrics()[f"grpc_server_handling_seconds_count{{{stream}}}"] == 0:
        assert time.monotonic() < deadline, "the end of the stream is not counted"
        time.sleep(0.05)
