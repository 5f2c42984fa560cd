"""A worker process of a test's own, stopped at a point of its life until it is killed.

    child_worker.py ADDRESS PHASE

Prints `at PHASE` once it is there. Phases: attached, registered (no token yet), ingesting (ranges
in flight without a pause), waiting (in WaitPublished), fetching (FetchClusters without a pause),
dropped (prompt published, then stream and attach connection closed; the mappings stay).
"""

import os
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(__file__))

from dense import Kv, method_of, shape_of  # noqa: E402  (needs the path above)
from worker import SERVED, Worker  # noqa: E402

PROMPT, MAX_TOKENS = 600, 3000


def ingest_forever(worker, ring, kv):
    """Prompts of several sequences, as fast as credits allow."""
    while True:
        sequence = worker.register(kv.shape, method_of(), MAX_TOKENS, SERVED)
        for _ in range(MAX_TOKENS // 200):
            worker.ingest_range(sequence, ring, kv, 0, kv.shape.layers, 200)
        worker.release(sequence)


def fetch_forever(worker, sequence, kv):
    position = PROMPT
    while True:  # the last position again and again, once it is reached
        for layer in range(kv.shape.layers):
            worker.fetch(sequence, kv, position, layer)
        position += 1
        if position == MAX_TOKENS:
            time.sleep(600)


def main(address, phase):
    def arrived():
        print("at", phase, flush=True)

    worker = Worker(address, name=f"child-{phase}")
    kv = Kv(shape_of(), MAX_TOKENS)
    ring = worker.allocate_ring(1 << 20)
    if phase == "attached":
        arrived()
    elif phase == "ingesting":
        threading.Timer(0.3, arrived).start()
        ingest_forever(worker, ring, kv)
    else:
        sequence = worker.register(kv.shape, method_of(), MAX_TOKENS, SERVED)
        if phase == "registered":
            arrived()
        elif phase == "waiting":
            worker.ingest_range(sequence, ring, kv, 0, 2, 300)
            threading.Timer(0.3, arrived).start()
            worker.wait(sequence, length=MAX_TOKENS, timeout=600)
        else:
            worker.ingest(sequence, ring, kv, PROMPT)
            worker.wait(sequence)
            if phase == "fetching":
                threading.Timer(0.3, arrived).start()
                fetch_forever(worker, sequence, kv)
            elif phase == "dropped":
                worker.drop()
                arrived()
    time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])
