"""The ids of calls, from the caller's metadata to the daemon's log and back, and the log of slow
operations."""

import json
import re
import subprocess
import time

import grpc
import pytest

from children import make_trace
from daemon import bound, clean_environment, program
from dense import Kv, method_of, shape_of
from wire import v1
from worker import SERVED, Worker, channel_to

Code = grpc.StatusCode
KEY = "x-request-id"
EVIL = 'a "name"\n{"level":"error"} \x01\u2028\x7f'


def failing_call(stub, metadata=None):
    """ReleaseSequence without a session: the error."""
    with pytest.raises(grpc.RpcError) as caught:
        stub.ReleaseSequence(v1.ReleaseSequenceRequest(sequence_id=1), timeout=bound(10),
                             metadata=metadata)
    return caught.value


def returned_id(error):
    return dict(error.trailing_metadata())[KEY]


def logged(daemon, message, seconds=10, **fields):
    """The one line of the log with this message and these fields, once it is there."""
    deadline = time.monotonic() + bound(seconds)
    while True:
        found = [record for record in daemon.records() if record["msg"] == message and
                 all(record.get(name) == value for name, value in fields.items())]
        if found:
            assert len(found) == 1, found
            return found[0]
        assert time.monotonic() < deadline, f"{message} {fields} is not logged:\n{daemon.log()}"
        time.sleep(0.05)


def test_a_callers_id_comes_back_and_is_logged(daemon):
    with channel_to(daemon.address) as channel:
        stub = v1.ClusterKvStub(channel)
        for given in ("abc-1", "A.b_c:9", "f" * 64):
            error = failing_call(stub, [(KEY, given)])
            assert returned_id(error) == given
            line = logged(daemon, "call failed", request_id=given)
            assert line["method"] == "ReleaseSequence"
            assert line["code"] == error.code().name and line["why"] == error.details()


def test_a_call_without_an_id_is_given_one(daemon):
    with channel_to(daemon.address) as channel:
        stub = v1.ClusterKvStub(channel)
        made = {returned_id(failing_call(stub)) for _ in range(3)}
        assert len(made) == 3
        for name in made:
            logged(daemon, "call failed", request_id=name)


@pytest.mark.parametrize("metadata", [[(KEY, "")], [(KEY, "x" * 65)], [(KEY, "two words")],
                                      [(KEY, 'a"b')], [(KEY, "a\\n")], [(KEY, "a"), (KEY, "b")]],
                         ids=["empty", "long", "blank", "quote", "backslash", "twice"])
def test_a_bad_id_is_refused_by_every_call(daemon, metadata):
    with channel_to(daemon.address) as channel:
        stub = v1.ClusterKvStub(channel)
        for name in ("AllocateArena", "RegisterSequence", "IngestTokens", "WaitPublished",
                     "FetchClusters", "ReleaseSequence", "ListSequences", "GetStatus"):
            with pytest.raises(grpc.RpcError) as caught:
                getattr(stub, name)(getattr(v1, f"{name}Request")(), timeout=bound(10),
                                    metadata=metadata)
            assert caught.value.code() == Code.INVALID_ARGUMENT
            assert caught.value.details().startswith(KEY)
        with pytest.raises(grpc.RpcError) as caught:
            next(stub.Session(iter([]), timeout=bound(10), metadata=metadata))
        assert caught.value.code() == Code.INVALID_ARGUMENT
        assert caught.value.details().startswith(KEY)
    for record in daemon.records():
        if record["msg"] == "call failed":
            assert record["request_id"] == "refused"
    assert daemon.status()["sessions"] == 0


def test_a_refused_session_is_logged_with_its_id(daemon):
    with channel_to(daemon.address) as channel:
        stub = v1.ClusterKvStub(channel)
        hello = v1.SessionRequest(hello=v1.Hello(protocol_version_min=9, protocol_version_max=9))
        with pytest.raises(grpc.RpcError) as caught:
            next(stub.Session(iter([hello]), timeout=bound(10), metadata=[(KEY, "session-1")]))
        assert returned_id(caught.value) == "session-1"
        line = logged(daemon, "call failed", request_id="session-1")
        assert line["method"] == "Session" and line["code"] == "FAILED_PRECONDITION"


def test_a_flood_of_bad_calls_does_not_flood_the_log(daemon):
    with channel_to(daemon.address) as channel:
        stub = v1.ClusterKvStub(channel)
        started = time.monotonic()
        for _ in range(300):
            failing_call(stub)
        lines = [record for record in daemon.records() if record["msg"] == "call failed"]
        assert 20 <= len(lines) <= 21 + 5 * (time.monotonic() - started)
        time.sleep(0.3)
        failing_call(stub, [(KEY, "after")])
        assert logged(daemon, "call failed", request_id="after")["left_out"] > 0
        assert daemon.status()["recent_errors"] == []  # what callers get wrong is no one's alarm


def test_the_clients_errors_name_the_call_that_the_daemon_logged(start_daemon, tmp_path):
    daemon = start_daemon({"host-memory": "4mb", "host-chunk": "2mb"})
    trace = make_trace(tmp_path / "t.safetensors", tokens=6000, decode_tokens=8)
    done = subprocess.run(
        [program("clusterkv-replay"), trace, "--connect", daemon.address, "--methods", "clusterkv",
         "--budgets", "64"], env=clean_environment(), capture_output=True, text=True,
        timeout=bound(120), check=False)
    assert done.returncode == 4, done
    [request_id] = re.findall(r"RegisterSequence at \S+ \(request ([0-9a-f]{8}-\d+)\): ",
                              done.stderr)
    line = logged(daemon, "call failed", request_id=request_id)
    assert line["method"] == "RegisterSequence" and line["level"] == "warning"
    opened = logged(daemon, "session opened")
    assert opened["request_id"].split("-")[0] == request_id.split("-")[0]


# --- Slow operations ----------------------------------------------------------------------------

PHASES = {
    # The first of 64, which waits between its phases on the device; and the others.
    "FetchClusters": ["core_queue_ms", "serve_queue_ms", "prepare_ms", "gather_ms", "attend_ms",
                      "results_ms", "core_return_ms"],
    "FetchClusters, not timed": ["core_queue_ms", "serve_queue_ms", "enqueue_ms", "device_ms",
                                 "results_ms", "core_return_ms"],
    "IngestTokens": ["core_queue_ms", "stage_queue_ms", "enqueue_ms", "device_ms",
                     "core_return_ms"],
    "clustering": ["queue_ms", "allocate_ms", "enqueue_ms", "device_ms", "permute_ms"],
    "session end": ["in_flight_ms", "give_back_ms"],
}


def work(daemon, name):
    """A session with each kind of operation; what its FetchClusters and its session were."""
    with Worker(daemon.address, name) as worker:
        kv = Kv(shape_of(), 400)
        ring = worker.allocate_ring(1 << 20)
        sequence = worker.register(kv.shape, method_of(), 400, SERVED)
        worker.ingest(sequence, ring, kv, 300)
        worker.wait(sequence)
        for layer in (0, 1):
            fetch = v1.FetchClustersRequest(session=worker.ref, layer=layer,
                                            items=[kv.fetch_item(sequence.id, 300, layer)])
            worker.stub.FetchClusters(fetch, timeout=bound(10),
                                      metadata=[(KEY, f"my-fetch-{layer}")])
        session = worker.welcome.session_id
    daemon.wait_until_free()
    return sequence.id, session


def slow_lines(daemon):
    return [record for record in daemon.records() if record["msg"] == "slow operation"]


def test_slow_operations_name_their_phases(start_daemon):
    daemon = start_daemon({"slow-operation": "1ns"})
    sequence, session = work(daemon, EVIL)
    lines = slow_lines(daemon)
    fetches = [line for line in lines if line["operation"] == "FetchClusters"]
    assert [(line["request_id"], line["session"], line["sequence"], line["layer"])
            for line in fetches] == [(f"my-fetch-{layer}", session, sequence, layer)
                                     for layer in (0, 1)]
    fetches[1]["operation"] += ", not timed"
    for operation, phases in PHASES.items():
        found = [line for line in lines if line["operation"] == operation]
        assert found, f"no slow {operation}"
        for line in found:
            assert line["level"] == "warning"
            assert [name for name in line if name.endswith("_ms")] == ["total_ms", *phases]
            assert abs(sum(line[name] for name in phases) - line["total_ms"]) < 0.01
            assert all(line[name] >= 0 for name in phases)
    [end] = [line for line in lines if line["operation"] == "session end"]
    assert end["session"] == session
    ingest = [line for line in lines if line["operation"] == "IngestTokens"]
    assert ingest[0]["position"] == 0 and ingest[0]["tokens"] == 300
    # The page has them too, and every line of the log was JSON, whatever the client's name.
    shown = daemon.status()["recent_errors"]
    assert any("slow operation operation=FetchClusters" in error["text"] for error in shown)
    [opened] = [record for record in daemon.records() if record["msg"] == "session opened"]
    assert opened["client"] == EVIL
    assert json.dumps(opened)  # and can be written again


@pytest.mark.parametrize("threshold", ["0", "100s"])
def test_what_is_not_slow_is_not_logged(start_daemon, threshold):
    daemon = start_daemon({"slow-operation": threshold})
    work(daemon, "quick")
    assert not slow_lines(daemon)


def test_slow_lines_are_bounded(start_daemon):
    daemon = start_daemon({"slow-operation": "1ns"})
    with Worker(daemon.address) as worker:
        kv = Kv(shape_of(), 400)
        ring = worker.allocate_ring(1 << 20)
        sequence = worker.register(kv.shape, method_of(), 400, SERVED)
        worker.ingest(sequence, ring, kv, 200)
        worker.wait(sequence)
        started = time.monotonic()
        for position in range(200, 240):
            for layer in range(kv.shape.layers):
                worker.fetch(sequence, kv, position, layer)
        fetches = [line for line in slow_lines(daemon) if line["operation"] == "FetchClusters"]
        assert 5 <= len(fetches) <= 6 + (time.monotonic() - started)
