"""A minimal worker that knows only the wire: Session stream, attach socket, ring and credits.

    with Worker(daemon.address) as worker:
        ring = worker.allocate_ring(1 << 20)
        sequence = worker.register(shape, method, max_tokens, SERVED)
        worker.ingest(sequence, ring, kv, end=prompt)
        worker.wait(sequence)
        reply = worker.fetch(sequence, kv, position, layer, want_output=True)
"""

import mmap
import os
import queue
import threading
import time

import grpc

from attach import AttachSocket
from daemon import bound
from wire import v1

SERVED, DIRECT = v1.FETCH_MODE_SERVED, v1.FETCH_MODE_DIRECT
ALIGNMENT = 64  # of ranges in an arena, bytes
CALL_SECONDS = bound(60)


def channel_to(address):
    """Own connection per channel, whatever other channels this process has."""
    return grpc.insecure_channel(address, options=[
        ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)])


class Ring:
    """Hands out ranges of an arena, oldest first; one is free again once its credit is back."""

    def __init__(self, arena_id, memory):
        self.arena_id, self.memory, self.size = arena_id, memory, len(memory)
        self.lent = []  # (offset, bytes) in the order of lending
        self.head = 0

    def find(self, size):
        """Offset for `size` bytes, or None. A range never wraps."""
        assert size <= self.size, f"{size} bytes can never fit a ring of {self.size}"
        if not self.lent:
            self.head = 0
            return 0
        tail = self.lent[0][0]
        if self.head > tail:
            if self.head + size <= self.size:
                return self.head
            return 0 if size < tail else None
        return self.head if self.head + size < tail else None

    def lend(self, offset, size):
        self.lent.append((offset, size))
        self.head = (offset + size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


class Sequence:
    """What the worker keeps of one."""

    def __init__(self, reply, shape, method):
        self.id, self.reply, self.shape, self.method = reply.sequence_id, reply, shape, method
        self.next_key = 1
        self.accepted = [0] * shape.layers  # tokens per layer
        self.last_offset = None  # where in the ring the last range lay


class Worker:
    """One session. Thread-safe for calls; events are taken on threads of its own.

    map_chunks False: grants of host chunks are kept, not answered (`pending_chunks`).
    attach False: the session stays without its attach connection.
    """

    def __init__(self, address, name="outsider", attach=True, map_chunks=True):
        self.address = address
        self.channel = channel_to(address)
        self.stub = v1.ClusterKvStub(self.channel)
        self.map_chunks = map_chunks
        self.changed = threading.Condition()
        self.arenas, self.chunks, self.pending_chunks = {}, {}, {}
        self.revoked_chunks, self.revoked_arenas = [], []
        self.rings = {}
        self.published, self.failed, self.draining = {}, {}, None
        self.stream_error = None  # grpc.RpcError, or "closed"
        self.attach_over, self.rejected = False, None
        self.next_register_key = 1
        self.attach_socket = None
        self._requests = queue.SimpleQueue()
        self._requests.put(v1.SessionRequest(hello=v1.Hello(
            protocol_version_min=1, protocol_version_max=1, state_layout_versions=[1],
            client_name=name)))
        self.stream = self.stub.Session(iter(self._requests.get, None))
        first = next(self.stream)
        assert first.WhichOneof("event") == "welcome", first
        self.welcome, self.boot_epoch = first.welcome, first.boot_epoch
        self.ref = v1.SessionRef(session_token=first.welcome.session_token,
                                 boot_epoch=first.boot_epoch)
        self._threads = [threading.Thread(target=self._read_stream, daemon=True)]
        if attach:
            self.attach()
        self._threads[0].start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # --- events ----------------------------------------------------------------------------

    def _read_stream(self):
        error = "closed"
        try:
            for event in self.stream:
                assert event.boot_epoch == self.boot_epoch
                with self.changed:
                    self._take_event(event)
                    self.changed.notify_all()
        except grpc.RpcError as raised:
            error = raised
        with self.changed:
            self.stream_error = error
            self.changed.notify_all()

    def _take_event(self, event):
        kind = event.WhichOneof("event")
        if kind == "credit_returned":
            credit = event.credit_returned
            self.rings[credit.arena_id].lent.remove((credit.offset, credit.bytes))
        elif kind == "segment_published":
            segment = event.segment_published
            self.published.setdefault(segment.sequence_id, []).append(
                (segment.published_segments, segment.cut))
        elif kind == "sequence_failed":
            self.failed[event.sequence_failed.sequence_id] = event.sequence_failed
        elif kind == "draining":
            self.draining = event.draining

    def attach(self):
        # A relative path begins at the folder of the gRPC socket.
        folder = os.path.dirname(self.address.removeprefix("unix:"))
        self.attach_socket = AttachSocket(os.path.join(folder, self.welcome.attach_path))
        self.attach_socket.hello(self.welcome.session_token, self.boot_epoch)
        event, _ = self.attach_socket.receive()
        assert event.WhichOneof("event") == "attached", event
        self.attach_socket.socket.settimeout(None)
        thread = threading.Thread(target=self._read_attach, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _read_attach(self):
        try:
            while (packet := self.attach_socket.receive()) is not None:
                with self.changed:
                    self._take_packet(*packet)
                    self.changed.notify_all()
        except OSError:
            pass
        with self.changed:
            self.attach_over = True
            self.changed.notify_all()

    def _take_packet(self, event, descriptor):
        kind = event.WhichOneof("event")
        if kind == "arena_granted":
            self.arenas[event.arena_granted.arena_id] = mmap.mmap(
                descriptor, event.arena_granted.bytes)
            os.close(descriptor)
        elif kind == "arena_revoked":
            self.arenas.pop(event.arena_revoked.arena_id).close()
            self.revoked_arenas.append(event.arena_revoked.arena_id)
        elif kind == "chunk_granted":
            self.pending_chunks[event.chunk_granted.chunk_index] = (
                event.chunk_granted.bytes, descriptor)
            if self.map_chunks:
                self.map_pending()
        elif kind == "chunk_revoked":
            index = event.chunk_revoked.chunk_index
            self.revoked_chunks.append(index)
            if index in self.chunks:
                self.chunks.pop(index).close()
                self.attach_socket.send(chunk_unmapped=v1.ChunkUnmapped(chunk_index=index))
        elif kind == "rejected":
            self.rejected = event.rejected
        else:
            raise AssertionError(f"an event of an unknown kind: {event}")

    def map_pending(self):
        """Maps and confirms the chunks that were granted and not answered."""
        for index, (size, descriptor) in list(self.pending_chunks.items()):
            self.chunks[index] = mmap.mmap(descriptor, size, prot=mmap.PROT_READ)
            os.close(descriptor)
            del self.pending_chunks[index]
            self.attach_socket.send(chunk_mapped=v1.ChunkMapped(chunk_index=index))

    def wait_for(self, fact, seconds=60):
        """Waits until fact() is true; asserts that it becomes so in time."""
        with self.changed:
            assert self.changed.wait_for(fact, bound(seconds)), "what was waited for did not happen"

    # --- calls -----------------------------------------------------------------------------

    def call(self, rpc, /, timeout=CALL_SECONDS, **fields):
        """One RPC with this session's reference; the reply is of this boot."""
        fields.setdefault("session", self.ref)
        request = getattr(v1, f"{rpc}Request")(**fields)
        reply = getattr(self.stub, rpc)(request, timeout=timeout)
        assert reply.boot_epoch == self.boot_epoch
        return reply

    def allocate_ring(self, size):
        reply = self.call("AllocateArena", bytes=size)
        self.wait_for(lambda: reply.arena_id in self.arenas)
        memory = self.arenas[reply.arena_id]
        assert len(memory) == reply.bytes >= size
        with self.changed:
            ring = self.rings[reply.arena_id] = Ring(reply.arena_id, memory)
        return ring

    def register(self, shape, method, max_tokens, mode, reserve_tokens=0):
        self.next_register_key += 1
        reply = self.call("RegisterSequence", shape=shape, method=method, max_tokens=max_tokens,
                          mode=mode, reserve_tokens=reserve_tokens,
                          idempotency_key=self.next_register_key)
        return Sequence(reply, shape, method)

    def put(self, ring, data):
        """Writes a range into the ring once there is room; its offset."""
        offset = None

        def found():
            nonlocal offset
            offset = ring.find(len(data))
            return offset is not None or self.stream_error
        with self.changed:
            if not found():
                assert self.changed.wait_for(found, CALL_SECONDS), "no credit comes back"
            assert offset is not None, f"the session is over: {self.stream_error}"
            ring.lend(offset, len(data))
        ring.memory[offset:offset + len(data)] = data
        return offset

    def ingest_range(self, sequence, ring, kv, layer_begin, layer_count, count, last=False):
        """The next `count` tokens of these layers, which must be equally far."""
        position = sequence.accepted[layer_begin]
        offset = self.put(ring, kv.pack(layer_begin, layer_count, position, count))
        sequence.last_offset = offset
        reply = self.call("IngestTokens", sequence_id=sequence.id, position=position, count=count,
                          layer_begin=layer_begin, layer_count=layer_count,
                          arena_id=ring.arena_id, ring_offset=offset, end_of_prompt=last,
                          idempotency_key=sequence.next_key)
        sequence.next_key += 1
        for layer in range(layer_begin, layer_begin + layer_count):
            sequence.accepted[layer] = position + count
        return reply

    def ingest(self, sequence, ring, kv, end, chunk=512, layers=None):
        """The prompt [0, end) in chunks, `layers` at a time; closes it with end_of_prompt."""
        layers = layers or sequence.shape.layers
        for begin in range(0, end, chunk):
            count = min(chunk, end - begin)
            for first in range(0, sequence.shape.layers, layers):
                self.ingest_range(sequence, ring, kv, first,
                                  min(layers, sequence.shape.layers - first), count,
                                  last=begin + count == end)

    def wait(self, sequence, length=0, timeout=CALL_SECONDS):
        return self.call("WaitPublished", sequence_id=sequence.id, length=length, timeout=timeout)

    def fetch(self, sequence, kv, position, layer, budget=0, **wants):
        """One layer of a served step, inline: the FetchResult."""
        wants = wants or {"want_output": True}
        return self.call("FetchClusters", layer=layer, budget_tokens=budget,
                         items=[kv.fetch_item(sequence.id, position, layer)], **wants).results[0]

    def release(self, sequence):
        self.call("ReleaseSequence", sequence_id=sequence.id)

    def mine(self):
        """ListSequences of this session."""
        return self.call("ListSequences").sequences

    # --- the end ---------------------------------------------------------------------------

    def close(self):
        """Unmaps, says goodbye, and closes. Idempotent."""
        if self.attach_socket is not None:
            try:
                self.attach_socket.send(goodbye=v1.Goodbye())
                self.wait_for(lambda: self.attach_over, 10)
            except OSError:
                pass  # the daemon has closed first
        self.drop()

    def drop(self):
        """Closes without a goodbye; the process lives on."""
        self.stream.cancel()
        self._requests.put(None)
        if self.attach_socket is not None:
            self.attach_socket.close()
        deadline = time.monotonic() + 10
        for thread in self._threads:
            thread.join(max(0, deadline - time.monotonic()))
        self.channel.close()
