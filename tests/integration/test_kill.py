"""SIGKILL of workers and of the daemon at many points: nothing stays held, nobody else notices."""

import json
import random
import signal
import subprocess
import threading
import time

import grpc
import pytest

from children import Child, make_trace, start_replay
from daemon import Daemon, bound, clean_environment, program
from dense import Kv, decode_step, method_of, shape_of
from scrape import Scraper, broken_rules
from wire import v1
from worker import SERVED, Worker

Code = grpc.StatusCode
MEMORY = {"host-memory": "512mb", "host-chunk": "8mb"}
SEQUENCES, STEPS = 16, 200
# Decode segments come often, so that clustering goes on while decoding.
FLAGS = ["--budgets", 64, "--sequences", SEQUENCES, "--steps", STEPS,
         "--set", "decode_segment_tokens=64"]


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "small.safetensors"
    return make_trace(path, seed=5, tokens=2560, decode_tokens=256)


def results_of(replay, seconds=120):
    """The JSON that a replay prints at its end, which must be a good one."""
    out, err = replay.communicate(timeout=bound(seconds))
    assert replay.returncode == 0, err
    return json.loads(out)["results"]


def assert_all_is_free(daemon, seconds=5):
    """As an operator sees it: clusterkvctl, until the time is over."""
    deadline = time.monotonic() + bound(seconds)
    while True:
        done = subprocess.run(
            [program("clusterkvctl"), "--address", daemon.address, "--timeout", str(bound(5)),
             "status", "--format", "json"], env=clean_environment(), capture_output=True,
            text=True, timeout=bound(30), check=False)
        assert done.returncode == 0, (done.returncode, done.stderr)
        status = json.loads(done.stdout)
        host, device = status["host_bytes"], status["gpu_bytes"]
        held = [status["sessions"], status["sequences"], host["used"], host["reserved"],
                host["quarantined"], device["used"]]
        if not any(held):
            assert host["total"] > 0 and status["ready"]
            return
        assert time.monotonic() < deadline, f"still held after {seconds} s: {held}"
        time.sleep(0.05)


def sequences_of(daemon, stub, pid):
    """The sequences of the session of that process."""
    mine = {session["session_id"] for session in daemon.status()["session_list"]
            if session["pid"] == pid}
    listed = stub.ListSequences(v1.ListSequencesRequest(), timeout=bound(20))
    return [info for info in listed.sequences if info.session_id in mine]


def in_ingest(infos):
    return len(infos) >= 2 and any(info.prompt_tokens == 0 for info in infos)


def in_decode(infos):
    return len(infos) == SEQUENCES and all(
        info.prompt_tokens and info.ingested_tokens > info.prompt_tokens for info in infos)


def kill_when(daemon, victim, there):
    """SIGKILLs the replay once it is there; what it held is given back within 5 s."""
    with grpc.insecure_channel(daemon.address) as channel:
        stub = v1.ClusterKvStub(channel)
        deadline = time.monotonic() + bound(60)
        while not there(sequences_of(daemon, stub, victim.pid)):
            assert victim.poll() is None, f"it ended too early: {victim.communicate()}"
            assert time.monotonic() < deadline, "it never got there"
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
        deadline = time.monotonic() + bound(5)
        while sequences_of(daemon, stub, victim.pid) or daemon.held()["quarantined"]:
            assert time.monotonic() < deadline, "the dead worker's sequences are still there"
            time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(trace):
    """results(mode): figures of a run that was alone."""
    known = {}

    def results(mode):
        if mode not in known:
            daemon = Daemon(MEMORY)
            known[mode] = results_of(start_replay(daemon.address, trace, *FLAGS, "--mode", mode))
            assert_all_is_free(daemon)
            daemon.stop()
        return known[mode]
    return results


@pytest.mark.parametrize("mode, there", [("direct", in_ingest), ("served", in_ingest),
                                         ("direct", in_decode), ("served", in_decode)])
def test_two_workers_one_killed_the_other_undisturbed(start_daemon, trace, undisturbed, mode,
                                                      there):
    expected = undisturbed(mode)
    daemon = start_daemon(MEMORY)
    with Scraper(daemon) as scraper:
        victim = start_replay(daemon.address, trace, *FLAGS, "--mode", mode, "--seed", 77)
        other = start_replay(daemon.address, trace, *FLAGS, "--mode", mode)
        try:
            kill_when(daemon, victim, there)
            alive = other.poll() is None
            assert results_of(other) == expected
            assert alive, "the other had ended before the kill"
            assert_all_is_free(daemon)
        finally:
            for replay in (victim, other):
                replay.kill()
        metrics = daemon.metrics()
        assert metrics["clusterkv_sessions_started_total"] == 2
        assert metrics["clusterkv_sessions_lost_total"] == 1
        assert metrics[f'clusterkv_cache_clusters_selected_total{{gpu="host",mode="{mode}"}}'] > 0
    assert scraper.count > 5


def test_kills_at_random_moments_leave_nothing(start_daemon, trace):
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    daemon = start_daemon(MEMORY)
    with Scraper(daemon):
        for i in range(8):
            replay = start_replay(daemon.address, trace, *FLAGS, "--mode",
                                  ("direct", "served")[i % 2])
            time.sleep(rng.uniform(0, 1.5))
            replay.kill()
            replay.communicate()
            assert_all_is_free(daemon)


def test_a_broken_scrape_is_seen():
    labels = '{gpu="host",mode="served"}'
    good = {f"a_selected_total{labels}": 3, f"a_hit_total{labels}": 1, f"a_missed_total{labels}": 2,
            'clusterkv_host_pool_bytes{state="free"}': 8,
            'clusterkv_host_pool_bytes{state="used"}': 4}
    assert not broken_rules(None, good) and not broken_rules(good, good)
    for series, value in ((f"a_hit_total{labels}", 2), (f"a_selected_total{labels}", 2),
                          ('clusterkv_host_pool_bytes{state="free"}', 4)):
        assert len(broken_rules(good, {**good, series: value})) == 1 + (value == 2 and
                                                                        "selected" in series)
    assert broken_rules(good, {key: good[key] for key in list(good)[:-1]})


# --- A Python worker killed between its calls, and in them ---------------------------------------

@pytest.mark.parametrize("phase", ["attached", "registered", "ingesting", "waiting", "fetching"])
def test_a_worker_killed_in_any_phase_leaves_nothing(daemon, phase):
    with Scraper(daemon), Worker(daemon.address, "bystander") as bystander:
        kv = Kv(shape_of(), 400)
        ring = bystander.allocate_ring(1 << 20)
        sequence = bystander.register(kv.shape, method_of(budget_tokens=512), 400, SERVED)
        bystander.ingest(sequence, ring, kv, 300, chunk=100)
        bystander.wait(sequence)
        alone = daemon.held()
        with Child(daemon.address, phase) as child:
            assert daemon.held()["sessions"] == 2
            decode_step(bystander, sequence, kv, 300)
            child.kill()
        started = time.monotonic()
        while (held := daemon.held()) != alone:
            assert time.monotonic() - started < bound(5), (held, alone)
            time.sleep(0.02)
        for position in range(301, 340):
            decode_step(bystander, sequence, kv, position)
    assert_all_is_free(daemon)


# --- The daemon killed -------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["direct", "served"])
def test_a_replay_ends_when_its_daemon_is_killed(start_daemon, trace, mode):
    daemon = start_daemon(MEMORY)
    replay = start_replay(daemon.address, trace, *FLAGS, "--mode", mode)
    try:
        with grpc.insecure_channel(daemon.address) as channel:
            stub = v1.ClusterKvStub(channel)
            while not in_decode(sequences_of(daemon, stub, replay.pid)):
                assert replay.poll() is None, replay.communicate()
        daemon.kill()
        out, err = replay.communicate(timeout=bound(10))
        assert replay.returncode == 3, (replay.returncode, out, err)
        assert not out and err.startswith("clusterkv-replay: ")
    finally:
        replay.kill()


def test_calls_fail_promptly_when_the_daemon_is_killed(daemon):
    worker = Worker(daemon.address)
    kv = Kv(shape_of(), 300)
    ring = worker.allocate_ring(1 << 20)
    sequence = worker.register(kv.shape, method_of(), 300, SERVED)
    worker.ingest_range(sequence, ring, kv, 0, 2, 200)
    failures = []

    def wait():
        try:
            worker.wait(sequence, length=300, timeout=600)
        except grpc.RpcError as error:
            failures.append((time.monotonic(), error.code()))
    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.3)
    killed = time.monotonic()
    daemon.kill()
    waiting.join(bound(10))
    assert failures[0][1] == Code.UNAVAILABLE and failures[0][0] - killed < bound(2)
    worker.wait_for(lambda: worker.stream_error and worker.attach_over, 5)
    assert worker.stream_error.code() == Code.UNAVAILABLE
    with pytest.raises(grpc.RpcError) as caught:
        worker.mine()
    assert caught.value.code() == Code.UNAVAILABLE
    # What was mapped stays readable.
    assert len(ring.memory[:]) == 1 << 20 and all(len(chunk[:]) for chunk in worker.chunks.values())
    worker.drop()


def test_a_new_daemon_takes_over_and_refuses_what_is_of_the_old_boot(start_daemon):
    first = start_daemon()
    worker = Worker(first.address)
    first.kill()
    second = start_daemon(first.settings)
    with Worker(second.address) as fresh:
        assert fresh.boot_epoch != worker.boot_epoch
        with pytest.raises(grpc.RpcError) as caught:
            fresh.call("ListSequences", session=worker.ref)
        assert caught.value.code() == Code.FAILED_PRECONDITION
        assert str(fresh.boot_epoch) in caught.value.details()
        kv = Kv(shape_of(), 210)
        ring = fresh.allocate_ring(1 << 20)
        sequence = fresh.register(kv.shape, method_of(budget_tokens=512), 210, SERVED)
        fresh.ingest(sequence, ring, kv, 200)
        fresh.wait(sequence)
        decode_step(fresh, sequence, kv, 200)
    worker.drop()
