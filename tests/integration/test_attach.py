"""The attach socket: who may come in, what each packet may be, and what its end means."""

import mmap
import os
import pathlib
import resource
import socket
import subprocess
import sys
import time

import grpc
import pytest

from attach import MAX_PACKET_BYTES, AttachSocket
from children import Child
from daemon import bound, clean_environment
from dense import Kv, decode_step, method_of, shape_of
from wire import v1
from worker import DIRECT, SERVED, Worker

Code = grpc.StatusCode
INVALID, DENIED = Code.INVALID_ARGUMENT.value[0], Code.PERMISSION_DENIED.value[0]
HERE = pathlib.Path(__file__).resolve().parent
METHOD = method_of(budget_tokens=512)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def worker(daemon):
    """An unattached session; at the end all it held must be free again."""
    made = Worker(daemon.address, attach=False)
    yield made
    made.close()
    daemon.wait_until_free()


@pytest.fixture
def raw(daemon):
    """A connection to the attach socket that has said nothing."""
    connection = AttachSocket(daemon.attach_path)
    yield connection
    connection.close()


def hello_packet(worker):
    return v1.AttachRequest(hello=v1.AttachHello(
        session_token=worker.welcome.session_token,
        boot_epoch=worker.boot_epoch)).SerializeToString()


def stays_attachable(worker):
    """What others tried has not touched the session: it attaches and answers."""
    worker.attach()
    assert len(worker.mine()) == 0


def test_hello_with_a_wrong_token_is_unauthenticated(worker, raw):
    raw.hello(b"y" * 16, worker.boot_epoch)
    code, message = raw.expect_rejected()
    assert code == Code.UNAUTHENTICATED.value[0] and "token" in message
    stays_attachable(worker)


@pytest.mark.parametrize("token", [b"", b"y" * 15, b"y" * 2000])
def test_hello_with_a_token_of_a_wrong_length_is_unauthenticated(worker, raw, token):
    raw.hello(token, worker.boot_epoch)
    assert raw.expect_rejected()[0] == Code.UNAUTHENTICATED.value[0]
    stays_attachable(worker)


@pytest.mark.parametrize("epoch", [0, 1, 2**64 - 1])
def test_hello_of_another_boot_is_refused_with_the_epoch(worker, raw, epoch):
    raw.hello(worker.welcome.session_token, epoch)
    code, message = raw.expect_rejected()
    assert code == Code.FAILED_PRECONDITION.value[0] and str(worker.boot_epoch) in message
    stays_attachable(worker)


@pytest.mark.parametrize("packet", [
    b"\x00", b"\xff" * 40, b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x7f", os.urandom(64) + b"\xff",
    v1.AttachRequest(chunk_mapped=v1.ChunkMapped(chunk_index=0)).SerializeToString(),
    v1.AttachRequest(chunk_unmapped=v1.ChunkUnmapped(chunk_index=0)).SerializeToString(),
    v1.AttachRequest(goodbye=v1.Goodbye()).SerializeToString(),
    b"z" * MAX_PACKET_BYTES,
], ids=["zero", "ones", "length", "cut", "random", "mapped", "unmapped", "goodbye", "largest"])
def test_a_first_packet_that_is_no_hello_is_refused(worker, raw, packet):
    raw.send_bytes(packet)
    assert raw.expect_rejected()[0] == INVALID
    stays_attachable(worker)


def test_an_oversize_packet_is_refused(worker, raw):
    raw.send_bytes(hello_packet(worker) + b"\x2a\xf0\x7f" + b"x" * (MAX_PACKET_BYTES + 1))
    code, message = raw.expect_rejected()
    assert code == INVALID and "4096" in message
    stays_attachable(worker)


def test_too_many_descriptors_are_refused_and_closed(daemon, worker, raw):
    open_before = len(os.listdir(f"/proc/{daemon.pid}/fd"))
    with open(os.devnull, "rb") as null:
        raw.send_bytes(hello_packet(worker), [null.fileno()] * 100)
        code, message = raw.expect_rejected()
    assert code == INVALID and "descriptors" in message
    stays_attachable(worker)
    worker.close()
    daemon.wait_until_free()
    assert len(os.listdir(f"/proc/{daemon.pid}/fd")) <= open_before


def test_a_stream_socket_cannot_connect(daemon):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        with pytest.raises(OSError):
            stream.connect(daemon.attach_path)


def test_a_second_attach_is_refused_and_the_first_goes_on(worker, raw):
    worker.attach()
    raw.hello(worker.welcome.session_token, worker.boot_epoch)
    code, message = raw.expect_rejected()
    assert code == Code.ALREADY_EXISTS.value[0] and "attached already" in message
    assert len(worker.mine()) == 0


def test_rejected_attaches_are_counted(daemon, worker):
    for _ in range(3):
        connection = AttachSocket(daemon.attach_path)
        connection.hello(b"n" * 16, worker.boot_epoch)
        connection.expect_rejected()
        connection.close()
    assert daemon.metrics()["clusterkv_rejected_attaches_total"] == 3
    stays_attachable(worker)


def ends(worker, message):
    """The session is over with ABORTED for that reason, and its calls are UNAUTHENTICATED."""
    worker.wait_for(lambda: worker.stream_error and worker.attach_over, 10)
    assert worker.stream_error.code() == Code.ABORTED
    assert message in worker.stream_error.details()
    with pytest.raises(grpc.RpcError) as caught:
        worker.mine()
    assert caught.value.code() == Code.UNAUTHENTICATED


@pytest.mark.parametrize("packet, message", [
    (b"\xff" * 9, "attach connection has closed"),
    (b"x" * (MAX_PACKET_BYTES + 1), "attach connection has closed"),
    (b"\x2a\x00", "attach connection has closed"),
    (v1.AttachRequest(chunk_mapped=v1.ChunkMapped(chunk_index=3)).SerializeToString(),
     "chunk 3 was not granted"),
    (v1.AttachRequest(chunk_mapped=v1.ChunkMapped(chunk_index=2**32 - 1)).SerializeToString(),
     "chunk 4294967295 was not granted"),
    (v1.AttachRequest(chunk_unmapped=v1.ChunkUnmapped(chunk_index=0)).SerializeToString(),
     "chunk 0 was not revoked"),
    (v1.AttachRequest(chunk_unmapped=v1.ChunkUnmapped(chunk_index=2**31)).SerializeToString(),
     "chunk 2147483648 was not revoked"),
], ids=["garbage", "oversize", "unknown", "mapped", "mapped-last", "unmapped", "unmapped-far"])
def test_a_packet_that_lies_ends_the_session(daemon, worker, packet, message):
    worker.attach()
    with Worker(daemon.address, "bystander") as bystander:
        ring = bystander.allocate_ring(1 << 16)
        worker.attach_socket.send_bytes(packet)
        ends(worker, message)
        assert len(bystander.mine()) == 0 and len(ring.memory) == 1 << 16


def test_a_second_hello_ends_the_session(worker):
    worker.attach()
    worker.attach_socket.hello(worker.welcome.session_token, worker.boot_epoch)
    ends(worker, "attach connection has closed")


def test_an_unmapping_that_nobody_asked_for_ends_the_session(daemon):
    worker, _, _ = published(daemon, DIRECT)
    worker.attach_socket.send(chunk_unmapped=v1.ChunkUnmapped(chunk_index=0))
    ends(worker, "chunk 0 was not revoked")
    # It may still be mapped, whatever the worker says: quarantined while the process lives.
    expected = {"sessions": 0, "sequences": 0, "used": 0, "reserved": 0,
                "quarantined": 4 << 20, "gpu": 0}
    deadline = time.monotonic() + bound(5)
    while daemon.held() != expected:
        assert time.monotonic() < deadline, daemon.held()
        time.sleep(0.02)
    worker.drop()


def test_closing_the_connection_ends_the_session(worker):
    worker.attach()
    worker.attach_socket.socket.shutdown(socket.SHUT_RDWR)
    ends(worker, "attach connection has closed")


def test_closing_the_stream_ends_the_connection(worker):
    worker.attach()
    worker.stream.cancel()
    worker.wait_for(lambda: worker.attach_over, 10)


def test_a_stream_that_is_half_closed_ends_the_session(worker):
    worker.attach()
    worker._requests.put(None)
    ends(worker, "closed the Session stream")


# --- Who may attach -----------------------------------------------------------------------------

def attach_as(address, uid, gid):
    """Attaches in a process of that uid and gid: what the daemon said, as (code, message)."""
    # Its interpreter's files may be closed to others: it drops root once it has loaded.
    script = (f"import os, sys; sys.path.insert(0, {str(HERE)!r})\n"
              "from worker import Worker; from attach import AttachSocket\n"
              f"worker = Worker({address!r}, attach=False)\n"
              f"os.setgroups([]); os.setgid({gid}); os.setuid({uid})\n"
              "a = AttachSocket(worker.welcome.attach_path)\n"
              "a.hello(worker.welcome.session_token, worker.boot_epoch)\n"
              "event, _ = a.receive()\n"
              "print(event.rejected.code, event.WhichOneof('event'), event.rejected.message)\n"
              "sys.stdout.flush(); os._exit(0)\n")
    done = subprocess.run([sys.executable, "-c", script], env=clean_environment(),
                          timeout=bound(60), capture_output=True, text=True, check=True)
    code, _, message = done.stdout.strip().partition(" ")
    return int(code), message


def open_to_all(daemon):
    """Lets every uid reach the socket: its file mode is the first gate, the list the second."""
    os.chmod(daemon.folder, 0o755)
    os.chmod(daemon.attach_path, 0o666)


def test_a_uid_that_is_not_listed_is_denied(start_daemon):
    daemon = start_daemon({"allow-uids": "12345"})
    worker = Worker(daemon.address, attach=False)
    connection = AttachSocket(daemon.attach_path)
    connection.hello(worker.welcome.session_token, worker.boot_epoch)
    code, message = connection.expect_rejected()
    assert code == DENIED and f"uid {os.geteuid()}" in message and "not allowed" in message
    connection.close()
    worker.close()


@as_root
def test_a_foreign_uid_is_denied_by_default(daemon):
    open_to_all(daemon)
    code, message = attach_as(daemon.address, 12345, 23456)
    assert code == DENIED and "uid 12345 and gid 23456 are not allowed" in message
    daemon.wait_until_free()


@as_root
@pytest.mark.parametrize("flags, allowed", [
    ({"allow-uids": "12345"}, True), ({"allow-uids": "0,12344"}, False),
    ({"allow-uids": "0", "allow-gids": "23456"}, True),
    ({"allow-uids": "0", "allow-gids": "12345"}, False), ({"allow-uids": "any"}, True),
])
def test_uids_and_gids_that_are_listed_may_attach(start_daemon, flags, allowed):
    daemon = start_daemon(flags)
    open_to_all(daemon)
    code, message = attach_as(daemon.address, 12345, 23456)
    assert (code, message.split()[0]) == ((0, "attached") if allowed else (DENIED, "rejected"))
    daemon.wait_until_free()


@as_root
def test_the_sockets_mode_keeps_others_out(daemon):
    os.chmod(daemon.folder, 0o755)
    script = ("import os, socket; os.setgid(23456); os.setuid(12345)\n"
              "s = socket.socket(socket.AF_UNIX, socket.{}); s.connect({!r})")
    for kind, path in (("SOCK_SEQPACKET", daemon.attach_path),
                       ("SOCK_STREAM", daemon.socket_path)):
        done = subprocess.run([sys.executable, "-c", script.format(kind, path)],
                              capture_output=True, text=True, timeout=bound(60), check=False)
        assert "PermissionError" in done.stderr


# --- Time ---------------------------------------------------------------------------------------

def test_a_session_that_never_attaches_is_ended(start_daemon):
    daemon = start_daemon({"attach-timeout": "1s"})
    worker = Worker(daemon.address, attach=False)
    started = time.monotonic()
    worker.wait_for(lambda: worker.stream_error, 10)
    assert 0.8 < time.monotonic() - started < bound(5)
    assert worker.stream_error.code() == Code.ABORTED
    assert "did not attach in time" in worker.stream_error.details()
    daemon.wait_until_free()
    worker.close()


def test_a_connection_without_hello_is_closed(start_daemon):
    daemon = start_daemon({"attach-timeout": "1s"})
    connection = AttachSocket(daemon.attach_path)
    code, message = connection.expect_rejected()
    assert code == Code.DEADLINE_EXCEEDED.value[0] and "AttachHello" in message
    connection.close()


def test_an_attached_session_that_is_idle_stays(start_daemon):
    daemon = start_daemon({"attach-timeout": "1s"})
    with Worker(daemon.address) as worker:
        time.sleep(2.5)
        assert len(worker.mine()) == 0 and worker.stream_error is None


def test_idle_connections_beyond_the_limit_keep_nobody_out_for_long(start_daemon):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    daemon = start_daemon({"attach-timeout": "1s"})
    idle = [AttachSocket(daemon.attach_path) for _ in range(1100)]
    worker = Worker(daemon.address, attach=False)
    deadline = time.monotonic() + bound(20)
    while worker.attach_socket is None:
        try:
            worker.attach()
        except (OSError, TypeError):  # closed at once
            worker.attach_socket = None
            assert time.monotonic() < deadline, "no worker gets in"
            time.sleep(0.1)
            worker.close()
            worker = Worker(daemon.address, attach=False)
    assert len(worker.mine()) == 0
    worker.close()
    for connection in idle:
        connection.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- Memory -------------------------------------------------------------------------------------

def published(daemon, mode, **options):
    """A worker with one sequence of 300 tokens, all published: (worker, kv, sequence)."""
    worker = Worker(daemon.address, **options)
    ring = worker.allocate_ring(1 << 20)
    kv = Kv(shape_of(), 400)
    sequence = worker.register(kv.shape, METHOD, 400, mode)
    worker.ingest(sequence, ring, kv, 300)
    if options.get("map_chunks", True):
        worker.wait(sequence)
    return worker, kv, sequence


def test_nothing_is_published_to_a_direct_worker_before_it_has_mapped(daemon):
    worker, _, sequence = published(daemon, DIRECT, map_chunks=False)
    with pytest.raises(grpc.RpcError) as caught:
        worker.wait(sequence, timeout=0.5)
    assert caught.value.code() == Code.DEADLINE_EXCEEDED
    assert worker.mine()[0].published_segments == 0
    worker.map_pending()
    assert worker.wait(sequence).published_segments == 3
    worker.close()
    daemon.wait_until_free()


def test_chunks_are_granted_read_only(daemon):
    worker, _, _ = published(daemon, DIRECT, map_chunks=False)
    worker.wait_for(lambda: worker.pending_chunks)
    for size, descriptor in worker.pending_chunks.values():
        assert size == worker.welcome.host_chunk_bytes
        assert os.fstat(descriptor).st_size == size
        with pytest.raises(PermissionError):
            mmap.mmap(descriptor, size, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(OSError):
            os.write(descriptor, b"x")
        with pytest.raises(OSError):
            os.ftruncate(descriptor, 0)
    worker.close()


def test_arenas_can_be_written_and_not_cut(daemon):
    with Worker(daemon.address, attach=False) as worker:
        connection = worker.attach_socket = AttachSocket(worker.welcome.attach_path)
        connection.hello(worker.welcome.session_token, worker.boot_epoch)
        assert connection.receive()[0].HasField("attached")
        reply = worker.call("AllocateArena", bytes=10000)
        event, descriptor = connection.receive()
        assert event.arena_granted.arena_id == reply.arena_id
        assert event.arena_granted.bytes == reply.bytes == 12288
        with mmap.mmap(descriptor, reply.bytes) as memory:
            assert memory[:] == bytes(reply.bytes)
            memory[:4] = b"data"
        # A worker that cuts it would make the daemon's next read of it a SIGBUS.
        with pytest.raises(OSError):
            os.ftruncate(descriptor, 0)
        os.close(descriptor)
        connection.close()
        worker.attach_socket = None


@pytest.mark.parametrize("mode", [DIRECT, SERVED])
def test_goodbye_gives_everything_back_at_once(daemon, mode):
    worker, _, _ = published(daemon, mode)
    assert daemon.held()["used"] == 4 << 20
    worker.close()
    assert daemon.wait_until_free() < bound(1)


def test_released_chunks_are_revoked_and_given_back_once_unmapped(daemon):
    worker, kv, sequence = published(daemon, DIRECT)
    assert 0 in worker.chunks and daemon.held()["used"] == 4 << 20
    worker.release(sequence)
    worker.wait_for(lambda: 0 in worker.revoked_chunks)
    worker.wait_for(lambda: sequence.reply.state_arena_id in worker.revoked_arenas)
    deadline = time.monotonic() + bound(5)
    while daemon.held()["quarantined"] or daemon.held()["used"]:
        assert time.monotonic() < deadline, daemon.held()
        time.sleep(0.02)
    ring = next(iter(worker.rings.values()))
    again = worker.register(kv.shape, METHOD, 400, SERVED)
    worker.ingest(again, ring, kv, 300)
    worker.wait(again)
    decode_step(worker, again, kv, 300)
    worker.close()


def test_chunks_that_are_not_unmapped_stay_in_quarantine(daemon):
    worker, _, sequence = published(daemon, DIRECT, map_chunks=False)
    worker.wait_for(lambda: worker.pending_chunks)
    worker.release(sequence)
    worker.wait_for(lambda: 0 in worker.revoked_chunks)
    time.sleep(0.5)
    held = daemon.held()
    assert held["quarantined"] == 4 << 20 and held["used"] == 0
    worker.attach_socket.send(chunk_unmapped=v1.ChunkUnmapped(chunk_index=0))
    deadline = time.monotonic() + bound(5)
    while daemon.held()["quarantined"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    worker.close()


def test_a_refusal_tells_what_is_in_quarantine(start_daemon):
    daemon = start_daemon({"host-memory": "4mb"})  # one chunk
    worker, kv, sequence = published(daemon, DIRECT, map_chunks=False)
    worker.wait_for(lambda: worker.pending_chunks)
    with pytest.raises(grpc.RpcError) as caught:
        worker.register(kv.shape, METHOD, 20000, SERVED)  # can never be
    assert "quarantine " not in caught.value.details()
    worker.release(sequence)
    worker.wait_for(lambda: 0 in worker.revoked_chunks)
    with pytest.raises(grpc.RpcError) as caught:
        worker.register(kv.shape, METHOD, 400, SERVED)
    assert caught.value.code() == Code.RESOURCE_EXHAUSTED
    assert f"{4 << 20} bytes are in quarantine and will be free soon" in caught.value.details()
    worker.attach_socket.send(chunk_unmapped=v1.ChunkUnmapped(chunk_index=0))
    deadline = time.monotonic() + bound(5)
    while daemon.held()["quarantined"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    worker.register(kv.shape, METHOD, 400, SERVED)
    worker.close()


def test_chunks_of_a_broken_session_stay_in_quarantine_until_the_process_dies(daemon):
    with Child(daemon.address, "dropped") as child:
        deadline = time.monotonic() + bound(5)
        while daemon.held()["sessions"] or daemon.held()["gpu"]:
            assert time.monotonic() < deadline, daemon.held()
            time.sleep(0.02)
        time.sleep(1.5)  # longer than any tick: nothing comes back while it lives
        held = daemon.held()
        assert held["quarantined"] == 4 << 20 and held["used"] == held["reserved"] == 0
        child.kill()
        assert daemon.wait_until_free() < bound(3)


def test_where_uids_differ_a_chunk_of_old_is_worth_nothing_to_who_kept_it(start_daemon):
    """The next worker gets another file; that of the first has no bytes any more."""
    daemon = start_daemon({"host-memory": "4mb", "allow-uids": "any"})
    path = pathlib.Path(daemon.folder, "kv", "chunk-000000.kv")
    for mode in (SERVED, DIRECT, SERVED):
        with open(path, "rb") as kept:
            worker, _, _ = published(daemon, mode)
            assert any(kept.read())
            worker.close()
            daemon.wait_until_free()
            assert os.fstat(kept.fileno()).st_size == 0
            assert os.fstat(kept.fileno()).st_ino != os.stat(path).st_ino
        assert path.read_bytes() == bytes(4 << 20)


def test_memory_is_zeroed_between_sessions(start_daemon):
    """One chunk in all: the second worker gets what the first had."""
    daemon = start_daemon({"host-memory": "4mb"})
    worker, _, _ = published(daemon, SERVED)
    with open(pathlib.Path(daemon.folder, "kv", "chunk-000000.kv"), "rb") as chunk:
        assert any(chunk.read())
        worker.close()
        daemon.wait_until_free()
        chunk.seek(0)
        assert not any(chunk.read())


def test_no_descriptor_is_left_behind(daemon):
    folder = f"/proc/{daemon.pid}/fd"
    published(daemon, DIRECT)[0].close()
    daemon.wait_until_free()
    before = len(os.listdir(folder))
    for _ in range(2):
        published(daemon, DIRECT)[0].close()
        with Child(daemon.address, "dropped"):
            pass
    daemon.wait_until_free()
    assert len(os.listdir(folder)) <= before + 2  # gRPC keeps some sockets for a while
