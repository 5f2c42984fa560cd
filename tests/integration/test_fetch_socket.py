"""FetchClusters over packets: the same call as the RPC, with the same refusals, and what a worker
that does not keep to the protocol loses (its connection, nothing else)."""

import os
import re
import time

import grpc
import pytest

from attach import AttachSocket
from daemon import bound
from dense import Kv, check_output, method_of, shape_of
from wire import v1
from worker import DIRECT, SERVED, Worker, channel_to

Code = grpc.StatusCode
INVALID, EXHAUSTED, DENIED, MISSING, EARLY, TOKEN = (code.value[0] for code in (
    Code.INVALID_ARGUMENT, Code.RESOURCE_EXHAUSTED, Code.PERMISSION_DENIED, Code.NOT_FOUND,
    Code.FAILED_PRECONDITION, Code.UNAUTHENTICATED))
MAX_PACKET_BYTES = 131072
MAX_CONNECTIONS = 1024
PROMPT, MAX_TOKENS = 150, 400
METHOD = method_of(budget_tokens=512)


class FetchSocket:
    """A connection for fetches."""

    def __init__(self, daemon):
        self.attach = AttachSocket(daemon.attach_path)
        self.attach.send(fetch_hello=v1.FetchHello())
        packet = self.attach.receive()
        assert packet is not None and packet[0].WhichOneof("event") == "attached", packet
        self.socket = self.attach.socket

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.attach.close()

    def send(self, request, request_id="test-1"):
        self.socket.send(v1.FetchCall(request_id=request_id, request=request).SerializeToString())

    def receive(self):
        data = self.socket.recv(MAX_PACKET_BYTES + 1)
        return v1.FetchAnswer.FromString(data) if data else None

    def call(self, request, request_id="test-1"):
        self.send(request, request_id)
        answer = self.receive()
        assert answer is not None, "closed without an answer"
        return answer


@pytest.fixture
def worker(daemon):
    made = Worker(daemon.address)
    yield made
    made.close()
    daemon.wait_until_free()


@pytest.fixture
def connection(daemon):
    with FetchSocket(daemon) as made:
        yield made


@pytest.fixture
def decoding(worker):
    """(kv, sequence): served, its prompt published."""
    shape = shape_of()
    kv = Kv(shape, MAX_TOKENS)
    sequence = worker.register(shape, METHOD, MAX_TOKENS, SERVED)
    worker.ingest(sequence, worker.allocate_ring(1 << 20), kv, PROMPT)
    worker.wait(sequence)
    return kv, sequence


def request_of(worker, kv, sequence, position, layer, **fields):
    """`layer` may be one that there is not: then with the tensors of layer 0."""
    given = {"session": worker.ref, "layer": layer, "want_output": True, **fields}
    of = layer if layer < sequence.shape.layers else 0
    given.setdefault("items", [kv.fetch_item(sequence.id, position, of)])
    return v1.FetchClustersRequest(**given)


def step(worker, connection, kv, sequence, position):
    """A step of all layers whose outputs are dense attention."""
    for layer in range(sequence.shape.layers):
        answer = connection.call(request_of(worker, kv, sequence, position, layer))
        assert answer.code == 0, answer.message
        assert answer.reply.boot_epoch == worker.boot_epoch
        check_output(answer.reply.results[0], kv, layer, position)


def test_steps_are_the_rpcs(worker, connection, decoding):
    """Each layer by packets, then repeated by the RPC; and the next step the other way round."""
    kv, sequence = decoding
    by = [lambda request: connection.call(request).reply,
          lambda request: worker.stub.FetchClusters(request, timeout=bound(20))]
    for position in range(PROMPT, PROMPT + 40):
        for layer in range(sequence.shape.layers):
            request = request_of(worker, kv, sequence, position, layer, want_selection=True)
            first, again = (call(request).results[0] for call in by)
            check_output(first, kv, layer, position)
            assert first.output == again.output and first.lse == again.lse
            assert first.cut == again.cut
            assert first.selected_positions == again.selected_positions
        by.reverse()


def test_refusals_are_the_rpcs(worker, connection, decoding):
    kv, sequence = decoding
    direct = worker.register(sequence.shape, METHOD, 100, DIRECT)
    item = kv.fetch_item(sequence.id, PROMPT, 0)
    wrong = [
        ({"session": v1.SessionRef()}, EARLY),
        ({"session": v1.SessionRef(session_token=b"x" * 16, boot_epoch=worker.boot_epoch)}, TOKEN),
        ({"layer": 7}, INVALID),
        ({"budget_tokens": 513}, INVALID),
        ({"items": []}, INVALID),
        ({"items": [item, item]}, INVALID),
        ({"items": [kv.fetch_item(sequence.id + 99, PROMPT, 0)]}, MISSING),
        ({"items": [kv.fetch_item(sequence.id, PROMPT + 1, 0)]}, EARLY),
        ({"items": [kv.fetch_item(direct.id, PROMPT, 0)]}, EARLY),
        ({"items": [kv.fetch_item(sequence.id, PROMPT, 0, q=v1.TensorRef())]}, INVALID),
    ]
    for fields, code in wrong:
        fields = {"layer": 0, **fields}
        request = request_of(worker, kv, sequence, PROMPT, **fields)
        answer = connection.call(request)
        with pytest.raises(grpc.RpcError) as caught:
            worker.stub.FetchClusters(request, timeout=bound(20))
        assert caught.value.code().value[0] == answer.code == code, (fields, answer)
        assert caught.value.details() == answer.message and answer.message
        assert not answer.HasField("reply")
    step(worker, connection, kv, sequence, PROMPT)


def test_request_ids_are_checked_and_logged(daemon, worker, connection, decoding):
    kv, sequence = decoding
    bad = request_of(worker, kv, sequence, PROMPT, 7)
    answer = connection.call(bad, "mine-77")
    deadline = time.monotonic() + bound(10)
    while not any(record.get("request_id") == "mine-77" and record["why"] == answer.message
                  for record in daemon.records() if record["msg"] == "call failed"):
        assert time.monotonic() < deadline, daemon.log()
        time.sleep(0.05)
    for request_id in ("", "with blank", "x" * 65):
        answer = connection.call(bad, request_id)
        assert answer.code == INVALID and "x-request-id" in answer.message


def test_calls_are_counted_as_the_rpcs(daemon, worker, connection, decoding):
    kv, sequence = decoding

    def handled(code):
        return sum(value for series, value in daemon.metrics().items()
                   if series.startswith("grpc_server_handled_total{") and
                   'grpc_method="FetchClusters"' in series and f'grpc_code="{code}"' in series)
    before = handled("OK"), handled("InvalidArgument")
    step(worker, connection, kv, sequence, PROMPT)
    connection.call(request_of(worker, kv, sequence, PROMPT, 9))
    assert handled("OK") == before[0] + sequence.shape.layers
    assert handled("InvalidArgument") == before[1] + 1


@pytest.mark.parametrize("packet", [b"\xff" * 9, b"\x0a\x7f", b"x" * (MAX_PACKET_BYTES + 1)],
                         ids=["junk", "cut", "too-large"])
def test_a_packet_that_is_no_call_closes_its_connection_alone(daemon, worker, connection, decoding,
                                                              packet):
    with FetchSocket(daemon) as other:
        other.socket.send(packet)
        assert other.receive() is None
    step(worker, connection, *decoding, PROMPT)


def test_descriptors_are_refused(daemon, worker, connection, decoding):
    with FetchSocket(daemon) as other:
        call = v1.FetchCall(request_id="a").SerializeToString()
        other.attach.send_bytes(call, [0])
        assert other.receive() is None
    step(worker, connection, *decoding, PROMPT)


def test_calls_that_do_not_wait_for_answers_harm_their_connection_alone(daemon, worker, connection,
                                                                        decoding):
    """Some are answered, in order, until the daemon has read one that came too early."""
    kv, sequence = decoding
    with FetchSocket(daemon) as other:
        answers = 0
        try:
            for number in range(2000):
                other.send(request_of(worker, kv, sequence, PROMPT, 9), f"early-{number}")
            while (answer := other.receive()) is not None:
                assert answer.code == INVALID
                answers += 1
                if answers == 2000:
                    break  # the daemon was faster each time
        except (BrokenPipeError, ConnectionResetError):
            pass
    step(worker, connection, kv, sequence, PROMPT)


def test_a_lost_answer_leaves_a_step_that_can_be_repeated(daemon, worker, connection, decoding):
    kv, sequence = decoding
    for position in range(PROMPT, PROMPT + 10):
        with FetchSocket(daemon) as other:
            other.send(request_of(worker, kv, sequence, position, 0))
        deadline = time.monotonic() + bound(20)
        while True:  # until the first call has returned
            answer = connection.call(request_of(worker, kv, sequence, position, 0))
            if answer.code != Code.ABORTED.value[0]:
                break
            assert time.monotonic() < deadline
        assert answer.code == 0, answer.message
        check_output(answer.reply.results[0], kv, 0, position)
        for layer in range(1, sequence.shape.layers):
            answer = connection.call(request_of(worker, kv, sequence, position, layer))
            check_output(answer.reply.results[0], kv, layer, position)


def test_an_answer_beyond_a_packet_is_refused_and_to_be_had_by_the_rpc(daemon, worker):
    shape = shape_of(layers=1, kv_heads=12, group=16, head_dim=256)
    kv = Kv(shape, 64)
    sequence = worker.register(shape, METHOD, 64, SERVED)
    worker.ingest(sequence, worker.allocate_ring(4 << 20), kv, 60)
    worker.wait(sequence)
    request = request_of(worker, kv, sequence, 60, 0)
    assert request.ByteSize() < MAX_PACKET_BYTES
    with FetchSocket(daemon) as connection:
        answer = connection.call(request)
        assert answer.code == EXHAUSTED
        assert re.search(r"answer of \d+ bytes .* 131072 .* RPC", answer.message)
        result = worker.stub.FetchClusters(request, timeout=bound(20)).results[0]
        check_output(result, kv, 0, 60)


def test_a_connection_outlives_no_session_of_others(worker, connection, decoding, daemon):
    """It belongs to no session: calls of one that has ended are refused, those of others go on."""
    kv, sequence = decoding
    gone = Worker(daemon.address)
    ref = gone.ref
    step(worker, connection, kv, sequence, PROMPT)
    gone.close()
    answer = connection.call(request_of(worker, kv, sequence, PROMPT + 1, 0, session=ref))
    assert answer.code == TOKEN
    step(worker, connection, kv, sequence, PROMPT + 1)


def test_who_may_not_attach_may_not_fetch(start_daemon):
    daemon = start_daemon({"allow-uids": str(os.geteuid() + 1)})
    with FetchRefused(daemon) as (code, message):
        assert code == DENIED and f"uid {os.geteuid()}" in message


class FetchRefused:
    """A context: the refusal of a FetchHello."""

    def __init__(self, daemon):
        self.attach = AttachSocket(daemon.attach_path)

    def __enter__(self):
        self.attach.send(fetch_hello=v1.FetchHello())
        return self.attach.expect_rejected()

    def __exit__(self, *_):
        self.attach.close()


def test_a_hello_within_a_session_is_a_protocol_error(daemon):
    worker = Worker(daemon.address)
    worker.attach_socket.send(fetch_hello=v1.FetchHello())
    worker.wait_for(lambda: worker.attach_over, bound(20))
    worker.drop()
    daemon.wait_until_free()


def test_connections_are_bounded_and_leave_no_descriptors(daemon, worker, decoding):
    def descriptors():
        return len(os.listdir(f"/proc/{daemon.pid}/fd"))
    before = descriptors()
    made = [FetchSocket(daemon) for _ in range(MAX_CONNECTIONS)]
    with FetchRefused(daemon) as (code, message):
        assert code == EXHAUSTED and f"allowed are {MAX_CONNECTIONS}" in message
    with channel_to(daemon.address) as channel:  # the rest goes on
        v1.ClusterKvStub(channel).GetStatus(v1.GetStatusRequest(), timeout=bound(20))
    step(worker, made[-1], *decoding, PROMPT)
    for one in made:
        one.attach.close()
    deadline = time.monotonic() + bound(20)
    while descriptors() > before:
        assert time.monotonic() < deadline, f"{descriptors()} descriptors, {before} before"
        time.sleep(0.05)
    with FetchSocket(daemon) as again:
        step(worker, again, *decoding, PROMPT + 1)


def test_the_end_of_the_daemon_is_the_end_of_its_connections(start_daemon):
    daemon = start_daemon()
    with FetchSocket(daemon) as connection:
        daemon.stop()
        assert connection.receive() is None
