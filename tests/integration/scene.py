"""A daemon with two workers in the middle of their work, to send bad requests to."""

import contextlib
import re
import time

import grpc
import pytest

from daemon import Daemon, bound
from dense import Kv, check_output, method_of, shape_of
from wire import v1
from worker import DIRECT, SERVED, Worker

BUDGET = 512  # above every length here: outputs are dense attention
PROMPT, MAX_TOKENS = 150, 900
# Decode segments that never fill: nothing is published while a row of the tables runs.
METHOD = method_of(budget_tokens=BUDGET, decode_segment_tokens=1024, window_lag_segments=0)
RING_BYTES = 1 << 20
GPU_BYTES = 192 << 20
MAX_ARENAS, MAX_SEQUENCES = 3, 5


class Scene:
    """`mine` has the sequences `good` (served, decoding), `open` (served, in its prompt, layer 0
    ahead), `full` (served, at max_tokens) and `direct`; `other` is a foreign session."""

    def __init__(self):
        self.daemon = Daemon({"gpu-memory": str(GPU_BYTES), "host-memory": "32mb",
                              "host-chunk": "2mb", "max-sessions": "4",
                              "attach-timeout": "600s",
                              "max-sequences-per-session": str(MAX_SEQUENCES),
                              "max-arenas-per-session": str(MAX_ARENAS)})
        self.shape = shape_of()
        self.kv = Kv(self.shape, MAX_TOKENS)
        self.mine = Worker(self.daemon.address, "mine")
        self.other = Worker(self.daemon.address, "other")
        self.unattached = Worker(self.daemon.address, "unattached", attach=False)
        gone = Worker(self.daemon.address, "gone")
        self.gone = gone.ref
        gone.close()
        self.ring = self.mine.allocate_ring(RING_BYTES)
        self.good = self._served(self.mine, MAX_TOKENS, PROMPT)
        self.position = PROMPT
        self.full = self._served(self.mine, PROMPT, PROMPT)
        self.open = self.mine.register(self.shape, METHOD, MAX_TOKENS, SERVED)
        self.mine.ingest_range(self.open, self.ring, self.kv, 0, 2, 20)
        self.mine.ingest_range(self.open, self.ring, self.kv, 0, 1, 10)
        self.direct = self.mine.register(self.shape, METHOD, 300, DIRECT)
        self.mine.ingest(self.direct, self.ring, self.kv, 100)
        self.mine.wait(self.direct)
        self.other_ring = self.other.allocate_ring(RING_BYTES)
        for _ in range(MAX_ARENAS - 1):
            self.foreign_arena = self.other.allocate_ring(4096).arena_id
        self.foreign = self._served(self.other, MAX_TOKENS, PROMPT, self.other_ring)
        self.good_step()
        self.wait_quiet()

    def _served(self, worker, max_tokens, prompt, ring=None):
        sequence = worker.register(self.shape, METHOD, max_tokens, SERVED)
        worker.ingest(sequence, ring or self.ring, self.kv, prompt)
        worker.wait(sequence)
        return sequence

    def wait_quiet(self):
        """Until all credits are back and the figures stand still."""
        self.mine.wait_for(lambda: not self.ring.lent)
        deadline = time.monotonic() + bound(30)
        before = self.daemon.steady()
        while True:
            time.sleep(0.05)
            after = self.daemon.steady()
            if after == before:
                return
            before = after
            assert time.monotonic() < deadline, "the daemon's figures do not come to rest"

    def picture(self):
        """Everything that a refused request must leave as it is."""
        sequences = self.mine.stub.ListSequences(v1.ListSequencesRequest(), timeout=bound(20))
        return (*self.daemon.steady(), sequences.SerializeToString(deterministic=True))

    @contextlib.contextmanager
    def refuses(self, codes, message=""):
        """The one call inside ends with `codes` (one, or a tuple of those allowed) and a message
        that has `message` (a regular expression), and changes nothing."""
        allowed = codes if isinstance(codes, tuple) else (codes,)
        before = self.picture()
        with pytest.raises(grpc.RpcError) as caught:
            yield
        error = caught.value
        assert error.code() in allowed, f"{error.code()}: {error.details()}"
        assert re.search(message, error.details()), error.details()
        assert self.picture() == before

    def good_step(self):
        """The next step of `good`, all layers; its outputs are dense attention."""
        for layer in range(self.shape.layers):
            result = self.mine.fetch(self.good, self.kv, self.position, layer)
            check_output(result, self.kv, layer, self.position)
        self.position += 1

    def close(self):
        try:
            for worker in (self.mine, self.other, self.unattached):
                worker.close()
            self.daemon.wait_until_free()
            self.daemon.stop()
        finally:
            self.daemon.discard()
