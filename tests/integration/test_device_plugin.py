"""The device plugin, against a kubelet that the tests play: clusterkv.io/host-gib from
registration to a worker in its container, and whatever either side does in between."""

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time

import grpc
import pytest

from attach import AttachSocket
from daemon import bound, clean_environment, program, run_to_end
from dense import Kv, decode_step, method_of, shape_of
from fake_kubelet import Container, Kubelet
from wire import ROOT, v1
from wire import kubelet as api
from worker import SERVED, Worker, channel_to

Code = grpc.StatusCode
GIB = 1 << 30
# A sequence for which 15 of the 16 chunks of a GiB are reserved: 32 rows of 512 bytes a token.
BIG_SHAPE = shape_of(layers=4, kv_heads=8, head_dim=128)
BIG_METHOD = method_of(prompt_segment_tokens=2048, tokens_per_cluster=64)
BIG_TOKENS = 56_000
PROMPT = 200
TRACE = ROOT / "tests/traces/smollm2-135m-moby-dick.safetensors"


@contextlib.contextmanager
def refused(*codes, message=""):
    with pytest.raises(grpc.RpcError) as caught:
        yield
    assert caught.value.code() in codes, caught.value
    assert message in caught.value.details(), caught.value.details()


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + bound(seconds)
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def register_big(worker):
    return worker.register(BIG_SHAPE, BIG_METHOD, BIG_TOKENS, SERVED)


def grants_of(daemon):
    """{grant: GiB} of /status."""
    return {one["grant"]: one["host_bytes"]["total"] / GIB for one in daemon.status()["grant_list"]}


def works(address):
    """A worker there goes all the way: prompt, decode, dense outputs."""
    with Worker(address) as worker:
        kv = Kv(shape_of(), PROMPT + 3)
        ring = worker.allocate_ring(1 << 20)
        sequence = worker.register(kv.shape, method_of(budget_tokens=512), PROMPT + 3, SERVED)
        worker.ingest(sequence, ring, kv, PROMPT)
        worker.wait(sequence)
        for position in range(PROMPT, PROMPT + 3):
            decode_step(worker, sequence, kv, position)


# --- Registration ---------------------------------------------------------------------------------

def test_registers_and_offers_a_device_for_each_gib(start_daemon, node, kubelet):
    daemon = start_daemon(node)
    kubelet.wait_registered()
    request, = kubelet.registrations
    assert (request.version, request.resource_name) == ("v1beta1", "clusterkv.io/host-gib")
    assert "/" not in request.endpoint
    options = kubelet.plugin.GetDevicePluginOptions(api.Empty(), timeout=bound(10))
    assert options == request.options
    assert options.get_preferred_allocation_available and not options.pre_start_required
    assert kubelet.devices == {f"gib-{i}": "Healthy" for i in range(3)}
    mode = os.stat(os.path.join(kubelet.folder, request.endpoint)).st_mode
    assert stat.S_IMODE(mode) == 0o600
    wait_until(lambda: daemon.metrics()["clusterkv_device_plugin_registered"] == 1)
    time.sleep(bound(2.5))  # two looks at the sockets later
    assert len(kubelet.registrations) == 1, "registered again without a reason"
    daemon.stop()
    kubelet.wait_for(lambda: kubelet.devices is None)
    assert os.listdir(kubelet.folder) == ["kubelet.sock"]


def test_serves_before_the_kubelet_is_there_and_through_its_restarts(start_daemon, node):
    daemon = start_daemon(node)
    assert daemon.http("/readyz")[0] == 200
    assert daemon.metrics()["clusterkv_device_plugin_registered"] == 0
    wait_until(lambda: "kubelet.sock is not there" in daemon.log())
    kubelet = Kubelet(node["device-plugin-dir"]).start()
    kubelet.wait_registered()
    held = Container(kubelet.allocate(["gib-0"])[0])
    with Worker(held.address) as worker:
        for times in (2, 3):
            kubelet.stop()
            wait_until(lambda: daemon.metrics()["clusterkv_device_plugin_registered"] == 0)
            kubelet.start()  # removes our socket, and makes its own anew
            kubelet.wait_registered(times)
            assert kubelet.allocate(["gib-2"])
        assert worker.stream_error is None, "the worker felt the kubelet's restart"
        assert worker.mine() is not None
    kubelet.stop()


def test_makes_its_socket_again_and_registers_when_it_is_not_watched(start_daemon, node, kubelet):
    daemon = start_daemon(node)
    kubelet.wait_registered()
    os.unlink(os.path.join(kubelet.folder, kubelet.registrations[0].endpoint))
    kubelet.wait_registered(times=2)
    kubelet.hang_up()  # the kubelet has forgotten us, though its socket is the same
    kubelet.wait_registered(times=3)
    assert kubelet.allocate(["gib-1"])
    assert "made the device plugin's socket again" in daemon.log()


def test_a_refusal_is_told_and_tried_again(start_daemon, node, kubelet):
    kubelet.refuse = (Code.UNIMPLEMENTED, "only version v9 is spoken here")
    daemon = start_daemon(node)
    wait_until(lambda: "only version v9 is spoken here" in daemon.log())
    time.sleep(bound(2.5))
    assert daemon.log().count("only version v9") == 1, "told more than once"
    assert daemon.http("/readyz")[0] == 200
    kubelet.refuse = None
    kubelet.wait_registered()


def test_a_daemon_that_drains_offers_no_healthy_device(start_daemon, node, kubelet):
    daemon = start_daemon({**node, "drain-timeout": "60s"})
    kubelet.wait_registered()
    container = Container(kubelet.allocate(["gib-0"])[0])
    with Worker(container.address) as worker:
        daemon.signal(signal.SIGTERM)
        kubelet.wait_registered(healthy=False)
        with refused(Code.UNAVAILABLE, message="draining"):
            kubelet.allocate(["gib-1"])
        worker.wait_for(lambda: worker.draining is not None)
    assert daemon.wait() == 0


# --- A grant --------------------------------------------------------------------------------------

def test_a_container_finds_its_sockets_whatever_its_uid(start_daemon, node, kubelet):
    daemon = start_daemon(node)
    kubelet.wait_registered()
    one, two = map(Container, kubelet.allocate(["gib-0", "gib-2"], ["gib-1"]))
    assert grants_of(daemon) == {one.grant: 2, two.grant: 1}
    for name in ("clusterkvd.sock", "clusterkvd.sock.attach"):
        info = os.stat(f"{one.folder}/{name}")
        assert stat.S_ISSOCK(info.st_mode) and stat.S_IMODE(info.st_mode) == 0o666
    assert stat.S_IMODE(os.stat(one.folder).st_mode) == 0o755
    assert stat.S_IMODE(os.stat(node["grants-dir"]).st_mode) == 0o700
    assert sorted(os.listdir(one.folder)) == ["clusterkvd.sock", "clusterkvd.sock.attach"]
    works(one.address)
    works(two.address)
    health = daemon.metrics()
    assert health["clusterkv_grants"] == 2 and health["clusterkv_grant_bytes"] == 3 * GIB


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can take another uid")
def test_a_worker_with_a_uid_of_its_own_attaches_at_its_grant_alone(start_daemon, node, kubelet):
    daemon = start_daemon(node)
    kubelet.wait_registered()
    container = Container(kubelet.allocate(["gib-0"])[0])
    # What a container's mount does: a way to the folder that does not lead through its parent. A
    # process that stands in it before it gives up root is in the same place.
    script = ("import os, sys; sys.path.insert(0, sys.argv[1]); from worker import Worker; "
              "os.chdir(sys.argv[2]); os.setgroups([]); os.setgid(54321); os.setuid(54321); "
              "w = Worker('unix:clusterkvd.sock'); w.allocate_ring(4096); "
              "print('attached', os.getuid()); w.close()")
    done = subprocess.run(
        [sys.executable, "-c", script, os.path.dirname(__file__), container.folder],
        capture_output=True, text=True, timeout=bound(60), check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert done.stdout == "attached 54321\n", done.stderr
    assert daemon.status()["sessions"] == 0


def test_all_sessions_of_a_grant_together_are_held_to_it(start_daemon, node, kubelet):
    daemon = start_daemon(node)
    kubelet.wait_registered()
    one, two = map(Container, kubelet.allocate(["gib-0"], ["gib-1", "gib-2"]))
    with Worker(one.address) as first, Worker(one.address) as second, Worker(two.address) as other:
        sequence = register_big(first)
        with refused(Code.RESOURCE_EXHAUSTED, message=f"grant {one.grant}"):
            register_big(first)
        with refused(Code.RESOURCE_EXHAUSTED, message=f"of {GIB} in use"):
            register_big(second)
        register_big(other)
        register_big(other)
        with refused(Code.RESOURCE_EXHAUSTED, message=f"of {2 * GIB} in use"):
            register_big(other)
        first.release(sequence)
        register_big(second)
        held = {one["grant"]: one["host_bytes"] for one in daemon.status()["grant_list"]}
        assert held[one.grant]["reserved"] <= GIB and held[two.grant]["reserved"] > GIB


def test_the_commons_never_takes_what_is_offered(start_daemon, node, kubelet):
    daemon = start_daemon({**node, "device-plugin-memory": "2gb"})
    kubelet.wait_registered()
    assert list(kubelet.devices) == ["gib-0", "gib-1"]
    with Worker(daemon.address) as worker:
        register_big(worker)
        with refused(Code.RESOURCE_EXHAUSTED, message="--device-plugin-memory"):
            register_big(worker)
        # Nothing was granted before; all of it can be now.
        container = Container(kubelet.allocate(["gib-0", "gib-1"])[0])
        with Worker(container.address) as granted:
            register_big(granted)
            register_big(granted)


def test_with_all_offered_a_worker_without_a_grant_is_told_where_it_went(start_daemon, node,
                                                                       kubelet):
    daemon = start_daemon(node)
    kubelet.wait_registered()
    with Worker(daemon.address) as worker:
        with refused(Code.RESOURCE_EXHAUSTED, message=f"{3 * GIB} more are kept"):
            worker.register(shape_of(), method_of(), 1000, SERVED)


def test_a_grant_cannot_touch_what_is_anothers(start_daemon, node, kubelet):
    daemon = start_daemon(node)
    kubelet.wait_registered()
    one, two = map(Container, kubelet.allocate(["gib-0"], ["gib-1"]))
    with Worker(one.address, "one") as mine, Worker(two.address, "two") as other, \
            Worker(one.address, attach=False) as waiting:
        ring = mine.allocate_ring(1 << 20)
        sequence = mine.register(shape_of(), method_of(), 1000, SERVED)
        # Even with the token in hand, by a socket that is not the grant's the session is unknown.
        for address in (two.address, daemon.address):
            stub = v1.ClusterKvStub(channel_to(address))
            calls = [
                (stub.AllocateArena, v1.AllocateArenaRequest(session=mine.ref, bytes=4096)),
                (stub.ReleaseSequence, v1.ReleaseSequenceRequest(session=mine.ref,
                                                                 sequence_id=sequence.id)),
                (stub.WaitPublished, v1.WaitPublishedRequest(session=mine.ref, length=1,
                                                             sequence_id=sequence.id)),
                (stub.ListSequences, v1.ListSequencesRequest(session=mine.ref))]
            for call, request in calls:
                with refused(Code.UNAUTHENTICATED):
                    call(request, timeout=bound(10))
        for path in (f"{two.folder}/clusterkvd.sock.attach", daemon.attach_path):
            thief = AttachSocket(path)
            thief.hello(waiting.welcome.session_token, waiting.boot_epoch)
            assert thief.expect_rejected()[0] == Code.UNAUTHENTICATED.value[0]
            thief.close()
        # With its own token it finds no id of another's.
        with refused(Code.NOT_FOUND):
            other.call("ReleaseSequence", sequence_id=sequence.id)
        with refused(Code.NOT_FOUND):
            other.call("IngestTokens", sequence_id=sequence.id, count=1, layer_count=1,
                       arena_id=ring.arena_id, idempotency_key=1)
        assert [info.sequence_id for info in mine.mine()] == [sequence.id]
        # And it is not shown that there are others.
        seen = other.stub.GetStatus(v1.GetStatusRequest(), timeout=bound(10))
        assert [info.client_name for info in seen.session_list] == ["two"]
        assert seen.host_bytes.total == GIB and seen.sequences == 0
        assert [info.grant for info in seen.grant_list] == [two.grant]
        assert not other.stub.ListSequences(v1.ListSequencesRequest()).sequences
        everything = v1.ClusterKvStub(channel_to(daemon.address)).GetStatus(v1.GetStatusRequest())
        assert everything.sessions == 3 and everything.host_bytes.total == 3 * GIB


def test_allocating_a_device_again_revokes_the_grant(start_daemon, node, kubelet):
    daemon = start_daemon(node)
    kubelet.wait_registered()
    old = Container(kubelet.allocate(["gib-0", "gib-1"])[0])
    worker = Worker(old.address)
    ring = worker.allocate_ring(1 << 20)
    kv = Kv(shape_of(), 400)
    sequence = worker.register(kv.shape, method_of(), 400, SERVED)
    worker.ingest(sequence, ring, kv, 400)
    new = Container(kubelet.allocate(["gib-1"])[0])
    worker.wait_for(lambda: worker.stream_error is not None)
    assert worker.stream_error.code() == Code.ABORTED
    assert worker.stream_error.details() == (
        f"grant {old.grant} was revoked: gib-1 was allocated anew")
    assert grants_of(daemon) == {new.grant: 1}
    assert not os.path.exists(old.folder)
    with refused(Code.UNAVAILABLE):
        Worker(old.address)
    works(new.address)
    worker.drop()
    # gib-0 is nobody's now.
    other = Container(kubelet.allocate(["gib-0"])[0])
    assert grants_of(daemon) == {new.grant: 1, other.grant: 1}
    assert len(os.listdir(node["grants-dir"])) == 5  # two folders, two records, the lock


def test_nonsense_is_refused_and_changes_nothing(start_daemon, node, kubelet):
    daemon = start_daemon(node)
    kubelet.wait_registered()
    held = Container(kubelet.allocate(["gib-0"])[0])
    for containers, message in (([["gib-7"]], "gib-7"), ([["gib-0", "x"]], "'x'"),
                                ([[]], "no device"), ([["gib-1"], ["gib-1"]], "twice"),
                                ([[""]], "unknown")):
        with refused(Code.INVALID_ARGUMENT, message=message):
            kubelet.allocate(*containers)
    assert kubelet.allocate() == []
    with refused(Code.UNIMPLEMENTED):  # not offered
        kubelet.plugin.PreStartContainer(api.PreStartContainerRequest(devices_ids=["gib-0"]))
    assert grants_of(daemon) == {held.grant: 1}


def test_prefers_devices_that_no_worker_holds(start_daemon, node, kubelet):
    start_daemon(node)
    kubelet.wait_registered()
    every = ["gib-0", "gib-1", "gib-2"]
    busy, _ = map(Container, kubelet.allocate(["gib-0"], ["gib-1"]))
    with Worker(busy.address):
        assert kubelet.prefer(every, 1) == ["gib-2"]
        assert kubelet.prefer(every, 2) == ["gib-2", "gib-1"]
        assert kubelet.prefer(every, 3) == ["gib-2", "gib-1", "gib-0"]
        assert kubelet.prefer(every, 2, must_include=["gib-0"]) == ["gib-0", "gib-2"]


# --- The daemon's restart -------------------------------------------------------------------------

@pytest.mark.parametrize("way", ["stop", "kill"])
def test_grants_outlive_the_daemon(start_daemon, node, kubelet, way):
    daemon = start_daemon(node)
    kubelet.wait_registered()
    one, two = map(Container, kubelet.allocate(["gib-0"], ["gib-1", "gib-2"]))
    inode = os.stat(one.folder).st_ino
    worker = Worker(one.address)
    if way == "kill":
        daemon.kill()
    else:
        worker.close()
        daemon.stop()
        assert not os.path.exists(f"{one.folder}/clusterkvd.sock")
    with refused(Code.UNAVAILABLE):
        Worker(one.address)
    again = start_daemon({**node, "listen": daemon.address})
    worker.drop()
    kubelet.wait_registered(times=2)
    assert grants_of(again) == {one.grant: 1, two.grant: 2}
    # The same folder: a container's mount leads to it, whatever has become of its name.
    assert os.stat(one.folder).st_ino == inode
    works(one.address)
    with Worker(one.address) as back, refused(Code.RESOURCE_EXHAUSTED, message=one.grant):
        register_big(back)
        register_big(back)
    # The kubelet has not forgotten them either, so that only a new allocation ends one.
    kubelet.allocate(["gib-0"])
    assert one.grant not in grants_of(again) and two.grant in grants_of(again)


def test_a_crash_at_any_point_of_an_allocation_leaves_no_half_of_a_grant(start_daemon, node,
                                                                        kubelet):
    daemon = start_daemon(node)
    kubelet.wait_registered()
    held = Container(kubelet.allocate(["gib-0"])[0])
    daemon.kill()
    grants = node["grants-dir"]
    os.mkdir(f"{grants}/00000000000000aa")  # a folder, and no record yet
    os.mkdir(f"{grants}/00000000000000bb")
    with open(f"{grants}/00000000000000bb.json.new", "w", encoding="utf-8") as file:
        file.write('{"version":1,"dev')
    os.mkdir(f"{grants}/00000000000000cc")  # a record, and no answer to the kubelet
    with open(f"{grants}/00000000000000cc.json", "w", encoding="utf-8") as file:
        json.dump({"version": 1, "devices": ["gib-2"]}, file)
    again = start_daemon({**node, "listen": daemon.address})
    kubelet.wait_registered(times=2)
    assert grants_of(again) == {held.grant: 1, "00000000000000cc": 1}
    assert sorted(os.listdir(grants)) == sorted(
        ["00000000000000cc", "00000000000000cc.json", held.grant, f"{held.grant}.json", "lock"])
    # The kubelet, which had no answer, asks again.
    fresh = Container(kubelet.allocate(["gib-2"])[0])
    assert grants_of(again) == {held.grant: 1, fresh.grant: 1}


def test_kills_in_the_midst_of_allocations_lose_none_that_was_answered(start_daemon, node, kubelet):
    """SIGKILL at random moments while the kubelet allocates one device after the other: whatever it
    was answered last for a device is there at the next start, if that device was not asked for
    again."""
    daemon = start_daemon(node)
    answered = {}
    for round_ in range(6):
        kubelet.wait_registered(times=round_ + 1)
        deadline = time.monotonic() + 0.02 * (round_ + 1)
        device, asked = None, 0
        while time.monotonic() < deadline:
            device = f"gib-{asked % 3}"
            answered[device] = Container(kubelet.allocate([device])[0])
            asked += 1
        assert asked > 0
        in_flight = f"gib-{asked % 3}"
        call = kubelet.plugin.Allocate.future(api.AllocateRequest(container_requests=[
            api.ContainerAllocateRequest(devices_ids=[in_flight])]))
        time.sleep(0.0015 * round_)
        daemon.kill()
        with contextlib.suppress(grpc.RpcError):
            answered[in_flight] = Container(call.result(timeout=bound(10)).container_responses[0])
            in_flight = None
        answered.pop(in_flight, None)  # may be revoked, or not
        daemon = start_daemon({**node, "listen": daemon.address})
        there = grants_of(daemon)
        for name, container in answered.items():
            assert there[container.grant] == 1, name
            assert os.path.exists(f"{container.folder}/clusterkvd.sock")
        assert sum(there.values()) <= 3


def test_a_record_of_devices_that_are_no_more_keeps_the_rest(start_daemon, node, kubelet):
    daemon = start_daemon(node)
    kubelet.wait_registered()
    container = Container(kubelet.allocate(["gib-0", "gib-2"])[0])
    daemon.stop()
    again = start_daemon({**node, "listen": daemon.address, "host-memory": "1gb"})
    assert grants_of(again) == {container.grant: 1}
    assert "a grant has shrunk with the pool" in again.log()
    works(container.address)


# --- What it cannot start with --------------------------------------------------------------------

def test_a_node_without_a_kubelet_is_told(node):
    flags = {**node, "listen": f"unix:{node['device-plugin-dir']}/../s.sock",
             "admin-listen": "127.0.0.1:0", "backend": "host", "device-plugin-dir": "/nowhere/dp"}
    code, out, err = run_to_end([f"--{key}={value}" for key, value in flags.items()])
    assert code == 3 and "READY" not in out
    assert "device-plugin-dir: /nowhere/dp" in err


def test_a_second_daemon_on_the_same_node_is_refused(start_daemon, node, kubelet, tmp_path):
    daemon = start_daemon(node)
    kubelet.wait_registered()
    container = Container(kubelet.allocate(["gib-0"])[0])
    flags = {**daemon.settings, "listen": f"unix:{tmp_path}/other.sock",
             "host-memory-dir": f"{tmp_path}/other"}
    code, _, err = run_to_end([f"--{key}={value}" for key, value in flags.items()])
    assert code == 3 and "grants-dir" in err and "another daemon" in err
    flags["grants-dir"] = node["grants-dir"] + "-2"
    code, _, err = run_to_end([f"--{key}={value}" for key, value in flags.items()])
    assert code == 3 and "another device plugin serves" in err
    assert kubelet.devices is not None and len(kubelet.registrations) == 1
    works(container.address)


def test_does_not_fight_over_its_name(start_daemon, node, kubelet):
    daemon = start_daemon(node)
    kubelet.wait_registered()
    path = os.path.join(kubelet.folder, kubelet.registrations[0].endpoint)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(path + ".new")
        stranger.listen()
        os.rename(path + ".new", path)
        inode = os.stat(path).st_ino
        wait_until(lambda: "another device plugin serves" in daemon.log())
        assert os.stat(path).st_ino == inode
    kubelet.wait_registered(times=2)  # nobody answers there any more


# --- Many -----------------------------------------------------------------------------------------

def test_a_grant_costs_no_thread_and_little_memory(start_daemon, node, kubelet):
    count = 8
    daemon = start_daemon({**node, "host-memory": f"{count}gb"})
    kubelet.wait_registered()

    def use():
        with open(f"/proc/{daemon.pid}/status", encoding="utf-8") as file:
            values = dict(line.split(":", 1) for line in file)
        return int(values["Threads"]), int(values["RssAnon"].split()[0]) / 1024

    kubelet.allocate(["gib-0"])  # gRPC's own threads have started
    threads, megabytes = use()
    started = time.monotonic()
    containers = [Container(kubelet.allocate([f"gib-{i}"])[0]) for i in range(count)]
    seconds = time.monotonic() - started
    more_threads, more_megabytes = use()
    print(f"{count} grants: {seconds / count * 1e3:.1f} ms each, {more_threads - threads} threads, "
          f"{(more_megabytes - megabytes) / count * 1024:.0f} KiB each")
    assert more_threads - threads <= 4
    assert more_megabytes - megabytes < count
    assert seconds < bound(count * 0.2)
    with Worker(containers[0].address), Worker(containers[-1].address):
        assert daemon.status()["sessions"] == 2


def test_the_tools_take_their_address_from_the_container(start_daemon, node, kubelet):
    daemon = start_daemon(node)
    kubelet.wait_registered()
    container = Container(kubelet.allocate(["gib-1"])[0])
    done = subprocess.run(
        [program("clusterkvctl"), "status", "--format", "json"], capture_output=True, text=True,
        env=clean_environment(CLUSTERKV_ADDRESS=container.address), timeout=bound(30), check=True)
    assert json.loads(done.stdout)["host_bytes"]["total"] == GIB
    # The C++ client, all the way: prompt, three steps direct, and the attach socket beside its own.
    sessions = daemon.metrics()["clusterkv_sessions_started_total"]
    done = subprocess.run(
        [program("clusterkv-replay"), str(TRACE), "--methods", "clusterkv", "--budgets", "64",
         "--steps", "3", "--format", "json"], capture_output=True, text=True, timeout=bound(60),
        env=clean_environment(CLUSTERKV_ADDRESS=container.address), check=True)
    assert json.loads(done.stdout)["results"][0]["method"] == "clusterkv"
    assert daemon.metrics()["clusterkv_sessions_started_total"] > sessions
    daemon.wait_until_free()
