"""clusterkvd from outside: start, files, refusals, health, drain, logs, configuration."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from daemon import READY, bound, clean_environment, program, run_to_end, scratch
from dense import Kv, decode_step, method_of, shape_of
from wire import v1
from worker import DIRECT, SERVED, Worker, channel_to

Code = grpc.StatusCode
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def folder():
    made = scratch()
    yield made
    shutil.rmtree(made, ignore_errors=True)


def mode_of(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def refused(settings, *words, code=2, **environment):
    """A clusterkvd with these settings ends with `code`, no READY, and says all of the words."""
    flags = [f"--{key}={value}" for key, value in settings.items() if value is not None]
    found, out, err = run_to_end(flags, **environment)
    assert found == code, (found, out, err)
    assert "READY" not in out
    for word in words:
        assert word in err, err
    return err


# --- Start and files ----------------------------------------------------------------------------

def test_ready_line_and_modes(daemon):
    assert READY.match(daemon.ready_line) and daemon.address == daemon.settings["listen"]
    assert mode_of(daemon.socket_path) == 0o660
    assert mode_of(daemon.attach_path) == 0o660
    memory = daemon.settings["host-memory-dir"]
    assert mode_of(memory) == 0o700
    chunks = [name for name in os.listdir(memory) if name != "lock"]
    assert len(chunks) == 16
    for name in chunks:
        info = os.stat(os.path.join(memory, name))
        assert stat.S_IMODE(info.st_mode) == 0o600
        assert info.st_size == 4 << 20 and info.st_blocks * 512 >= info.st_size  # pages are taken
    assert daemon.http("/readyz")[0] == 200
    daemon.stop()
    assert not os.path.exists(daemon.socket_path) and not os.path.exists(daemon.attach_path)


def test_the_configuration_in_force_is_logged(daemon):
    effective = {record["key"]: record["value"] for record in daemon.records()
                 if record["msg"] == "config"}
    assert effective["host-memory"] == "64mb" and effective["host-chunk"] == "4mb"
    assert effective["listen"] == daemon.address
    assert effective["attach-path"] == daemon.attach_path
    assert effective["drain-timeout"] == "10s"  # a default


def test_a_memory_folder_that_is_there_and_not_empty_serves(start_daemon, folder):
    memory = os.path.join(folder, "kv")
    os.mkdir(memory, 0o777)
    os.chmod(memory, 0o777)
    for name in ("readme.txt", "chunk-000000.kv"):
        with open(os.path.join(memory, name), "w", encoding="utf-8") as file:
            file.write("old")
    daemon = start_daemon({"host-memory-dir": memory})
    assert mode_of(memory) == 0o700
    daemon.stop()
    assert os.path.exists(os.path.join(memory, "readme.txt")), "a file that is not the daemon's"
    assert not os.path.exists(os.path.join(memory, "chunk-000000.kv"))


def test_a_second_daemon_on_the_socket_is_refused(daemon, folder):
    with Worker(daemon.address) as worker:
        settings = {**daemon.settings, "host-memory-dir": f"{folder}/kv"}
        refused(settings, "listen", "another daemon", daemon.socket_path, code=3)
        assert worker.stream_error is None and len(worker.mine()) == 0
        with Worker(daemon.address, "later") as later:  # both sockets are still the first's
            later.allocate_ring(4096)


def test_a_second_daemon_on_the_memory_folder_is_refused(daemon, folder):
    with Worker(daemon.address) as worker:
        kv = Kv(shape_of(), 210)
        ring = worker.allocate_ring(1 << 20)
        sequence = worker.register(kv.shape, method_of(budget_tokens=512), 210, SERVED)
        worker.ingest(sequence, ring, kv, 200)
        worker.wait(sequence)
        refused({**daemon.settings, "listen": f"unix:{folder}/other.sock"},
                "host-memory-dir", "another daemon", code=3)
        assert len(os.listdir(daemon.settings["host-memory-dir"])) == 17
        for position in range(200, 210):
            decode_step(worker, sequence, kv, position)


def test_a_second_daemon_on_the_admin_port_is_refused(daemon, folder):
    refused({**daemon.settings, "listen": f"unix:{folder}/other.sock",
             "host-memory-dir": f"{folder}/kv", "admin-listen": daemon.admin},
            "admin-listen", daemon.admin, code=3)
    assert daemon.http("/livez")[0] == 200
    assert os.listdir(f"{folder}/kv") in ([], ["lock"]), "a refused daemon leaves its chunks"


def test_too_little_room_is_an_error_at_start(daemon, folder):
    """On a small tmpfs; never a SIGBUS later."""
    mounted = os.path.join(folder, "small")
    os.mkdir(mounted)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", mounted],
                          capture_output=True, check=False) if os.geteuid() == 0 else None
    if done is None or done.returncode != 0:
        pytest.skip("cannot mount a tmpfs here")
    try:
        err = refused({**daemon.settings, "listen": f"unix:{folder}/s.sock",
                       "host-memory-dir": f"{mounted}/kv"}, "host-memory", code=4)
        assert "No space left" in err and ("chunk 2 of 16" in err or "chunk 3 of 16" in err)
        assert [name for name in os.listdir(f"{mounted}/kv") if name != "lock"] == []
    finally:
        subprocess.run(["umount", mounted], check=True)


def test_a_stale_socket_is_replaced(start_daemon, folder):
    settings = {"listen": f"unix:{folder}/s.sock", "host-memory-dir": f"{folder}/kv"}
    first = start_daemon(settings)
    first.kill()
    assert os.path.exists(first.socket_path), "what SIGKILL leaves"
    second = start_daemon(settings)
    with Worker(second.address) as worker:
        worker.allocate_ring(4096)


def test_cuda_that_is_not_there_is_an_error(daemon, folder):
    code, out, err = run_to_end([f"--listen=unix:{folder}/s.sock", "--backend=cuda",
                                 "--host-memory=16mb", f"--host-memory-dir={folder}/kv",
                                 "--admin-listen=127.0.0.1:0"])
    if "READY" in out:
        pytest.skip("there is a CUDA device")
    assert code in (2, 3) and "cuda" in err
    assert daemon.status()["backend"] == "host"


# --- Health, reflection, admin ------------------------------------------------------------------

def health(channel, service=""):
    return health_pb2_grpc.HealthStub(channel).Check(
        health_pb2.HealthCheckRequest(service=service), timeout=bound(10)).status


def test_health_and_reflection(daemon):
    with channel_to(daemon.address) as channel:
        assert health(channel) == health(channel, "clusterkv.v1.ClusterKv") == SERVING
        with pytest.raises(grpc.RpcError) as caught:
            health(channel, "clusterkv.v1.Nothing")
        assert caught.value.code() == Code.NOT_FOUND
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        replies = stub.ServerReflectionInfo(iter([
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(
                file_containing_symbol="clusterkv.v1.ClusterKv")]), timeout=bound(10))
        names = {service.name for service in next(replies).list_services_response.service}
        assert {"clusterkv.v1.ClusterKv", "grpc.health.v1.Health"} <= names
        files = next(replies).file_descriptor_response.file_descriptor_proto
        assert any(b"FetchClusters" in file for file in files)


def test_admin_endpoints(daemon):
    for path in ("/livez", "/readyz", "/startupz"):
        assert daemon.http(path)[0::2] == (200, "ok\n")
    status, headers, body = daemon.http("/status")
    assert status == 200 and headers["Content-Type"] == "application/json"
    found = json.loads(body)
    assert {"version", "backend", "boot_epoch", "ready", "sessions", "sequences", "host_bytes",
            "gpu_bytes"} <= found.keys()
    assert found["host_bytes"] == {"total": 64 << 20, "used": 0, "reserved": 0, "quarantined": 0}
    assert daemon.http("/version")[2].strip() == found["version"]
    status, headers, body = daemon.http("/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    for name in ("clusterkv_cache_clusters_selected_total", "clusterkv_cache_tokens_hit_total",
                 "clusterkv_cache_bytes_missed_total", "clusterkv_host_gathered_bytes_total",
                 "clusterkv_ingested_tokens_total", "clusterkv_clustered_tokens_total",
                 "clusterkv_published_segments_total", "clusterkv_sessions",
                 "clusterkv_sequences", "clusterkv_host_pool_bytes", "clusterkv_gpu_arena_bytes",
                 "clusterkv_build_info"):
        assert f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}\n" in body
    states = {series: value for series, value in daemon.metrics().items()
              if series.startswith("clusterkv_host_pool_bytes")}
    assert sum(states.values()) == 64 << 20 and len(states) == 4


def test_clusterkvctl_status_says_what_the_admin_port_says(start_daemon):
    daemon = start_daemon({"threads": "3"})

    def told(form):
        done = subprocess.run(
            [program("clusterkvctl"), "--address", daemon.address, "status", "--format", form],
            env=clean_environment(), capture_output=True, text=True, timeout=bound(30), check=True)
        return done.stdout
    lost = Worker(daemon.address, "lost")
    lost.drop()
    with Worker(daemon.address) as worker:
        worker.allocate_ring(4096)
        while len(daemon.status()["session_list"]) != 1:
            time.sleep(0.02)
        by_grpc, by_http = json.loads(told("json")), daemon.status()
        for status in (by_grpc, by_http):
            status.pop("uptime_seconds")
            status.pop("device_age_seconds")
            status["session_list"][0].pop("age_seconds")
        assert by_grpc == by_http
        assert by_grpc["device"] == "host CPU, 3 threads"
        assert by_grpc["counters"]["sessions_started"] == 2
        assert by_grpc["counters"]["sessions_lost"] == 1
        [error] = by_grpc["recent_errors"]
        assert error["level"] == "warning" and error["count"] == 1
        assert error["text"].startswith("session over session=1 client=lost why=")
        assert "host CPU, 3 threads" in told("table")
        for form in (worker.ref.session_token.hex(), worker.ref.session_token.decode("latin-1")):
            assert form not in told("json") + daemon.http("/status")[2], "the token is a secret"


@pytest.mark.parametrize("path", ["//", "/statusz", "/status/", "/../etc/passwd", "/metrics/x",
                                  "/" + "a" * 1000])
def test_an_unknown_path_is_not_found(daemon, path):
    assert daemon.http(path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_other_methods_are_refused(daemon, method):
    before = daemon.steady()
    for path in ("/status", "/livez", "/nothing"):
        code, headers, _ = daemon.http(path, method)
        assert code == 405 and headers["Allow"] == "GET, HEAD"
    assert daemon.steady() == before
    assert daemon.http("/status", "HEAD")[0::2] == (200, "")


# --- Drain --------------------------------------------------------------------------------------

def test_drain_with_a_session_that_leaves(start_daemon):
    daemon = start_daemon({"drain-timeout": "30s"})
    with channel_to(daemon.address) as channel:
        worker = Worker(daemon.address)
        kv = Kv(shape_of(), 300)
        ring = worker.allocate_ring(1 << 20)
        sequence = worker.register(kv.shape, method_of(budget_tokens=512), 300, SERVED)
        worker.ingest(sequence, ring, kv, 200)
        worker.wait(sequence)
        assert health(channel) == SERVING
        started = time.monotonic()
        daemon.signal(signal.SIGTERM)
        worker.wait_for(lambda: worker.draining, 5)
        assert 20000 < worker.draining.deadline_milliseconds <= 30000
        assert health(channel) == health(channel, "clusterkv.v1.ClusterKv") == NOT_SERVING
        assert daemon.http("/readyz")[0::2] == (503, "draining\n")
        assert daemon.http("/livez")[0] == 200
        assert daemon.status()["ready"] is False
        # What runs goes on; new work is refused.
        for position in range(200, 220):
            decode_step(worker, sequence, kv, position)
        for call in (lambda: Worker(daemon.address, "new"),
                     lambda: worker.allocate_ring(4096),
                     lambda: worker.register(kv.shape, method_of(), 100, DIRECT)):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() == Code.UNAVAILABLE and "draining" in caught.value.details()
        worker.close()
        assert daemon.wait() == 0 and time.monotonic() - started < bound(10)


def test_drain_with_a_session_that_stays_is_bounded(start_daemon):
    daemon = start_daemon({"drain-timeout": "1s"})
    worker = Worker(daemon.address)
    started = time.monotonic()
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert 0.9 < time.monotonic() - started < bound(6)
    worker.wait_for(lambda: worker.stream_error and worker.attach_over, 5)
    assert worker.stream_error.code() == Code.UNAVAILABLE
    worker.drop()


def test_drain_with_a_waiting_call_and_an_open_attach_is_bounded(start_daemon):
    daemon = start_daemon({"drain-timeout": "500ms"})
    worker = Worker(daemon.address)
    silent = Worker(daemon.address, "never attaches", attach=False)
    sequence = worker.register(shape_of(), method_of(), 300, DIRECT)
    waiting = worker.stub.WaitPublished.future(v1.WaitPublishedRequest(
        session=worker.ref, sequence_id=sequence.id, length=300), timeout=60)
    daemon.signal(signal.SIGTERM)
    assert daemon.wait(bound(10)) == 0
    assert waiting.exception(bound(5)).code() in (Code.NOT_FOUND, Code.UNAVAILABLE)
    worker.drop()
    silent.drop()


def test_housekeeping_goes_on_while_the_daemon_drains(start_daemon):
    daemon = start_daemon({"drain-timeout": "60s", "attach-timeout": "2s"})
    worker = Worker(daemon.address)
    silent = Worker(daemon.address, "never attaches", attach=False)
    sequence = worker.register(shape_of(), method_of(), 300, DIRECT)
    worker.wait_for(lambda: sequence.reply.state_arena_id in worker.arenas)
    daemon.signal(signal.SIGTERM)
    worker.wait_for(lambda: worker.draining, 5)
    # A direct worker counts in its state: L layers of {clusters, tokens} x {hit, missed}, bytes,
    # on the third 256 bytes after the header's, the count's and the latch's.
    worker.arenas[sequence.reply.state_arena_id][3 * 256:3 * 256 + 8] = (5).to_bytes(8, "little")
    mode = '{gpu="host",mode="direct"}'
    deadline = time.monotonic() + bound(10)
    while daemon.metrics()[f"clusterkv_cache_clusters_hit_total{mode}"] != 5:
        assert time.monotonic() < deadline, "the counters are not sampled"
        time.sleep(0.05)
    silent.wait_for(lambda: silent.stream_error, 10)
    assert silent.stream_error.code() == Code.ABORTED
    assert "did not attach in time" in silent.stream_error.details()
    assert worker.stream_error is None
    worker.close()
    assert daemon.wait(bound(10)) == 0
    silent.drop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_daemon_stops_at_once(start_daemon, number):
    daemon = start_daemon()
    started = time.monotonic()
    daemon.signal(number)
    assert daemon.wait() == 0 and time.monotonic() - started < bound(3)


def test_a_second_signal_ends_the_drain(start_daemon):
    daemon = start_daemon({"drain-timeout": "60s"})
    worker = Worker(daemon.address)
    daemon.signal(signal.SIGTERM)
    worker.wait_for(lambda: worker.draining, 5)
    daemon.signal(signal.SIGTERM)
    assert daemon.wait(bound(10)) == 0
    worker.drop()


# --- Addresses ----------------------------------------------------------------------------------

def test_tcp_on_loopback_with_an_attach_path(start_daemon, folder):
    daemon = start_daemon({"listen": "127.0.0.1:0", "attach-path": f"{folder}/attach"})
    assert daemon.address.startswith("127.0.0.1:") and not daemon.address.endswith(":0")
    with Worker(daemon.address) as worker:
        assert worker.welcome.attach_path == f"{folder}/attach"
        kv = Kv(shape_of(), 202)
        ring = worker.allocate_ring(1 << 20)
        sequence = worker.register(kv.shape, method_of(budget_tokens=512), 202, SERVED)
        worker.ingest(sequence, ring, kv, 200)
        worker.wait(sequence)
        decode_step(worker, sequence, kv, 200)
    refused({**daemon.settings, "listen": daemon.address, "host-memory-dir": f"{folder}/kv2",
             "attach-path": f"{folder}/attach2"}, "listen", daemon.address, code=3)
    assert daemon.http("/livez")[0] == 200


@pytest.mark.parametrize("taken", ["attach_path", "socket_path"])
def test_a_second_daemon_does_not_take_the_attach_path(daemon, folder, taken):
    """It would get the first's workers, or remove its socket, though all else is its own."""
    for listen in ("127.0.0.1:0", f"unix:{folder}/s.sock"):
        refused({**daemon.settings, "listen": listen, "attach-path": getattr(daemon, taken),
                 "host-memory-dir": f"{folder}/kv"},
                "attach-path", "another daemon", getattr(daemon, taken), code=3)
        with Worker(daemon.address) as worker:
            assert len(worker.mine()) == 0


ADDRESSES = {
    "tcp-without-attach": ({"listen": "127.0.0.1:0"}, ["attach-path", "needed"]),
    "tcp-to-all": ({"listen": "0.0.0.0:5000", "attach-path": "/tmp/a"},
                   ["listen", "not a loopback address", "0.0.0.0:5000"]),
    "tcp6-to-all": ({"listen": "[::]:5000", "attach-path": "/tmp/a"}, ["not a loopback"]),
    "tcp-by-name": ({"listen": "example.org:5000", "attach-path": "/tmp/a"}, ["not a loopback"]),
    "admin-to-all": ({"admin-listen": "0.0.0.0:0"}, ["admin-listen", "not a loopback"]),
    "admin-without-port": ({"admin-listen": "127.0.0.1"}, ["admin-listen", "HOST:PORT"]),
    "relative": ({"listen": "unix:some.sock"}, ["listen", "absolute"]),
    "too-long": ({"listen": "unix:/" + "s" * 120}, ["listen", "at most 107"]),
    "same": ({"attach-path": "/tmp/x.sock", "listen": "unix:/tmp/x.sock"}, ["attach-path"]),
}


@pytest.mark.parametrize("name", ADDRESSES)
def test_bad_addresses_are_refused(folder, name):
    settings, words = ADDRESSES[name]
    refused({"listen": f"unix:{folder}/s.sock", "host-memory": "16mb",
             "host-memory-dir": f"{folder}/kv", **settings}, *words)
    assert not os.path.exists(f"{folder}/kv")


# --- Configuration ------------------------------------------------------------------------------

def write(path, text):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    return path


def test_a_flag_goes_before_the_environment_before_the_file(start_daemon, folder):
    file = write(f"{folder}/c.yaml", "host-memory: 16mb\nhost-chunk: 8mb\nmax-sessions: 3\n"
                                     "threads: 1\n")
    daemon = start_daemon({"config": file, "host-memory": "48mb", "host-chunk": None},
                          environment={"CLUSTERKV_HOST_MEMORY": "32mb",
                                       "CLUSTERKV_MAX_SESSIONS": "5"})
    effective = {record["key"]: record["value"] for record in daemon.records()
                 if record["msg"] == "config"}
    assert effective["host-memory"] == "48mb"  # the flag
    assert effective["max-sessions"] == "5"  # the environment
    assert effective["host-chunk"] == "8mb" and effective["threads"] == "1"  # the file
    assert daemon.status()["host_bytes"]["total"] == 48 << 20


def test_memory_is_taken_from_the_numa_node_that_is_asked_for(start_daemon):
    with open("/sys/devices/system/node/has_memory", encoding="ascii") as file:
        node = int(re.split("[-,]", file.read())[0])
    daemon = start_daemon({"host-numa-node": str(node)})
    told = {record["msg"]: record for record in daemon.records()}
    forbidden = told.get("cannot choose the NUMA node of host memory")  # by a container's seccomp profile
    if forbidden:
        assert "Operation not permitted" in forbidden["why"]
    else:
        record = told["host memory is taken from one NUMA node"]
        assert record["node"] == node and record["chunks_there"] <= record["of"]
    assert daemon.status()["ready"]


ERRORS = {
    "unknown-flag": (["--host-memroy=1gb"], {}, None, ["--host-memroy", "host-memory"]),
    "unknown-variable": ([], {"CLUSTERKV_HOSTMEMORY": "1gb"}, None,
                         ["CLUSTERKV_HOSTMEMORY", "did you mean 'host-memory'"]),
    "unknown-in-file": ([], {}, "host_memory: 1gb\n", ["host_memory", "did you mean"]),
    "bad-size": (["--host-memory=lots"], {}, None, ["--host-memory", "'lots' is not a size"]),
    "negative-size": (["--host-memory=-1gb"], {}, None, ["--host-memory", "-1gb"]),
    "overflowing-size": (["--host-memory=99999999tb"], {}, None, ["99999999tb"]),
    "size-in-variable": ([], {"CLUSTERKV_HOST_CHUNK": "3xb"}, None, ["CLUSTERKV_HOST_CHUNK"]),
    "size-in-file": ([], {}, "host-memory: [1, 2]\n", ["host-memory", "one value"]),
    "bad-yaml": ([], {}, "a: b: c\n", ["c.yaml"]),
    "bad-choice": (["--backend=tpu"], {}, None, ["--backend", "auto|host|cuda"]),
    "two-gpus": (["--devices=0,1"], {}, None, ["--devices", "one for now"]),
    "no-such-node": (["--host-numa-node=1023"], {}, None, ["--host-numa-node", "node with memory"]),
    "bad-number": (["--max-sessions=0"], {}, None, ["--max-sessions", "from 1 to"]),
    "bad-duration": (["--drain-timeout=soon"], {}, None, ["--drain-timeout", "soon"]),
    "bad-ids": (["--allow-uids=root"], {}, None, ["--allow-uids", "root"]),
    "nobody": (["--allow-uids=", "--allow-gids="], {}, None, ["allow-uids", "allow-gids"]),
    "chunk-above-memory": (["--host-memory=8mb", "--host-chunk=16mb"], {}, None,
                           ["host-memory", "host-chunk", "16mb"]),
    "odd-chunk": (["--host-chunk=3mb"], {}, None, ["host-chunk", "multiple of 2mb"]),
    "twice": (["--threads=1", "--threads=2"], {}, None, ["--threads", "twice"]),
    "no-value": (["--threads"], {}, None, ["--threads", "missing"]),
    "no-file": (["--config=/nonexistent.yaml"], {}, None, ["/nonexistent.yaml"]),
    "stray": (["serve"], {}, None, ["'serve'"]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_configuration_errors_name_the_key(folder, name):
    flags, environment, text, words = ERRORS[name]
    flags = [f"--listen=unix:{folder}/s.sock", f"--host-memory-dir={folder}/kv", *flags]
    if text:
        flags.append("--config=" + write(f"{folder}/c.yaml", text))
    code, out, err = run_to_end(flags, **environment)
    assert code == 2 and not out, (code, out, err)
    assert all(word in err for word in words), err
    assert os.listdir(folder) in ([], ["c.yaml"]), "something was made before the refusal"


def test_help_and_version():
    for flag, word in (("--help", "--host-memory-dir"), ("--version", "clusterkvd ")):
        done = subprocess.run([program("clusterkvd"), flag], capture_output=True, text=True,
                              env=clean_environment(), timeout=bound(30), check=True)
        assert word in done.stdout and not done.stderr


# --- Logs ---------------------------------------------------------------------------------------

def test_json_logs_carry_session_and_sequence(start_daemon):
    daemon = start_daemon({"log-format": "json"})
    evil = 'a "name"\n{"level":"error"} \x01'
    with Worker(daemon.address, evil) as worker:
        sequence = worker.register(shape_of(), method_of(), 100, SERVED)
        worker.release(sequence)
        session = worker.welcome.session_id
        token = bytes(worker.ref.session_token)
    daemon.wait_until_free()
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    records = daemon.records()  # parses every line
    assert all({"ts", "level", "msg"} <= record.keys() for record in records)
    by_message = {record["msg"]: record for record in records}
    assert by_message["session opened"]["session"] == session
    assert by_message["session opened"]["client"] == evil
    assert by_message["sequence registered"]["session"] == session
    assert by_message["sequence registered"]["sequence"] == sequence.id
    assert by_message["sequence released"]["sequence"] == sequence.id
    assert by_message["session over"]["session"] == session
    assert [record["msg"] for record in records].index("draining") < len(records) - 1
    assert records[-1]["msg"] == "stopped"
    for form in (token.hex(), token.decode("latin-1")):
        assert form not in daemon.log(), "the token is a secret"


def test_text_logs_have_one_line_an_event(start_daemon):
    daemon = start_daemon({"log-format": "text"})
    with Worker(daemon.address, "two\nlines"):
        pass
    daemon.wait_until_free()
    lines = daemon.log().splitlines()
    assert all(line[:4].isdigit() and line[10] == "T" for line in lines)
    assert any("session opened" in line and "session=1" in line for line in lines)
