"""Ingest by ring and credits, and what a served decode step then computes."""

import time

import grpc
import numpy as np
import pytest

from dense import (Kv, attended_positions, check_output, decode_step, method_of, output_of,
                   relative_error, shape_of)
from wire import v1
from worker import DIRECT, SERVED, Worker

Code = grpc.StatusCode
ALL = 2048  # a budget above every context here, so that outputs are dense attention


@pytest.fixture
def worker(daemon):
    with Worker(daemon.address) as made:
        yield made
    daemon.wait_until_free()


def refused(code, call, *arguments, **fields):
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **fields)
    assert caught.value.code() == code, caught.value.details()
    return caught.value.details()


# --- Ring and credits ---------------------------------------------------------------------------

@pytest.mark.parametrize("mode", [SERVED, DIRECT])
def test_a_segment_ten_times_the_ring_passes(start_daemon, mode):
    """8 layers, 4 heads, d 128, fp16: a segment of 2,048 tokens has 32 MiB, the ring 3."""
    daemon = start_daemon({"host-memory": "160mb", "host-chunk": "4mb"})
    shape = shape_of(layers=8, kv_heads=4, group=2, head_dim=128)
    prompt = 2048 + 700
    kv = Kv(shape, prompt + 2)
    with Worker(daemon.address) as worker:
        ring = worker.allocate_ring(3 << 20)
        sequence = worker.register(shape, method_of(
            prompt_segment_tokens=2048, tokens_per_cluster=64, kmeans_iterations=2,
            budget_tokens=4096), prompt + 2, mode)
        worker.ingest(sequence, ring, kv, prompt, chunk=512, layers=1)
        reply = worker.wait(sequence)
        assert (reply.published_segments, reply.cut) == (2, prompt - 16)
        assert 2048 * kv.token_bytes() >= 10 * ring.size
        worker.wait_for(lambda: not ring.lent)  # every credit comes back
        # A segment's event may be read a moment after the reply of WaitPublished.
        worker.wait_for(lambda: worker.published.get(sequence.id) == [
            (1, 4 + 2048), (2, prompt - 16)])
        if mode == SERVED:
            decode_step(worker, sequence, kv, prompt)
        metrics = daemon.metrics()
        assert metrics["clusterkv_ingested_tokens_total"] == prompt + (mode == SERVED)
        assert metrics["clusterkv_clustered_tokens_total"] == prompt - 16 - 4
        assert metrics["clusterkv_published_segments_total"] == 2
    daemon.wait_until_free()


def test_a_range_beyond_the_credits_is_refused(start_daemon):
    """A range of 64 MiB is on its way for longer than a call takes; if not, the next try is."""
    daemon = start_daemon({"host-memory": "1gb"})
    shape = shape_of(layers=16, kv_heads=8, head_dim=128)
    count, tries = 1024, 6
    with Worker(daemon.address) as worker:
        size = count * 16 * 2 * 8 * 128 * 2
        ring = worker.allocate_ring(size)
        sequence = worker.register(
            shape, method_of(prompt_segment_tokens=1024, budget_tokens=8, min_window_tokens=0,
                             tokens_per_cluster=64, kmeans_iterations=1), tries * count, DIRECT)
        messages = []
        for i in range(tries):
            offset = worker.put(ring, bytes(size))
            fields = {"sequence_id": sequence.id, "count": count, "layer_count": 16,
                      "arena_id": ring.arena_id, "ring_offset": offset}
            worker.call("IngestTokens", **fields, position=i * count, idempotency_key=2 * i + 1)
            try:
                worker.call("IngestTokens", **{**fields, "count": 1, "layer_count": 1,
                                               "ring_offset": size - 65536},
                            position=(i + 1) * count, idempotency_key=2 * i + 2)
            except grpc.RpcError as error:
                messages.append((error.code(), error.details()))
                if error.code() == Code.RESOURCE_EXHAUSTED:
                    break
            else:  # the credit had come back already; the extra range has one too
                break
        assert messages, "every credit came back before the next call"
        code, details = messages[-1]
        assert code == Code.RESOURCE_EXHAUSTED and "beyond the credits" in details
        assert f"arena {ring.arena_id}" in details
        worker.wait_for(lambda: not ring.lent)


def test_layers_run_ahead_of_each_other(worker):
    shape = shape_of(layers=4)
    kv, rng = Kv(shape, 420), np.random.default_rng(3)
    ring = worker.allocate_ring(1 << 18)
    sequence = worker.register(shape, method_of(budget_tokens=ALL), 420, SERVED)
    while min(sequence.accepted) < 400:
        layer = int(rng.choice([i for i in range(4) if sequence.accepted[i] < 400]))
        count = min(int(rng.integers(1, 90)), 400 - sequence.accepted[layer])
        last = sequence.accepted[layer] + count == 400
        reply = worker.ingest_range(sequence, ring, kv, layer, 1, count, last=last)
        assert reply.ingested_tokens <= min(sequence.accepted)
    assert worker.wait(sequence).cut == 384
    for position in range(400, 420):
        decode_step(worker, sequence, kv, position)


def test_nothing_is_published_before_its_slowest_layer_is_there(worker):
    kv = Kv(shape_of(), 400)
    ring = worker.allocate_ring(1 << 20)
    sequence = worker.register(kv.shape, method_of(), 400, SERVED)
    worker.ingest_range(sequence, ring, kv, 0, 1, 400)
    worker.ingest_range(sequence, ring, kv, 1, 1, 4 + 128 + 16 - 1)
    worker.wait_for(lambda: not ring.lent)
    time.sleep(0.3)
    assert worker.mine()[0].published_segments == 0
    worker.ingest_range(sequence, ring, kv, 1, 1, 1)
    worker.wait_for(lambda: worker.published.get(sequence.id) == [(1, 132)])


# --- The prompt's end ---------------------------------------------------------------------------

def test_the_prompt_ends_at_one_position_for_all_layers(worker):
    kv = Kv(shape_of(), 200)
    ring = worker.allocate_ring(1 << 20)
    sequence = worker.register(kv.shape, method_of(budget_tokens=ALL), 200, SERVED)

    def ingest(layer, count, last):
        return worker.ingest_range(sequence, ring, kv, layer, 1, count, last)

    def is_refused(message, *arguments):
        assert message in refused(Code.FAILED_PRECONDITION, ingest, *arguments)
        with worker.changed:  # the refused range was never the daemon's: it is free at once
            ring.lent.pop()

    assert "length 0" in refused(Code.FAILED_PRECONDITION, worker.wait, sequence)
    ingest(0, 150, True)
    is_refused("has ended at 150, in other layers not yet", 0, 1, False)
    is_refused("the prompt has 150 in other layers", 1, 151, False)
    is_refused("the prompt has 150 in other layers", 1, 149, True)
    is_refused("the prompt has 150 in other layers", 1, 150, False)
    ingest(1, 100, False)
    # The end is known, so the call waits; it is not over before the slowest layer is there.
    refused(Code.DEADLINE_EXCEEDED, worker.wait, sequence, timeout=0.3)
    is_refused("with end_of_prompt true, but", 1, 49, True)
    ingest(1, 50, True)
    assert worker.wait(sequence).cut == 134
    is_refused("prompt of layer 0 has ended at 150", 0, 1, False)  # served: FetchClusters appends
    decode_step(worker, sequence, kv, 150)


def test_a_direct_sequence_is_fed_on_past_its_prompt(worker):
    kv = Kv(shape_of(), 300)
    ring = worker.allocate_ring(1 << 20)
    sequence = worker.register(kv.shape, method_of(), 300, DIRECT)
    worker.ingest(sequence, ring, kv, 100)
    assert worker.wait(sequence).cut == 84
    for position in range(100, 300):
        for layer in range(2):
            worker.ingest_range(sequence, ring, kv, layer, 1, 1)
        if position == 200:
            assert worker.wait(sequence, length=201).cut == 84 + 3 * 32
    assert worker.wait(sequence, length=300).cut == 84 + 6 * 32
    assert "beyond max_tokens" in refused(Code.OUT_OF_RANGE, worker.call, "IngestTokens",
                                          sequence_id=sequence.id, position=300, count=1,
                                          layer_count=2, arena_id=ring.arena_id,
                                          idempotency_key=sequence.next_key)


# --- What is attended ---------------------------------------------------------------------------

@pytest.mark.parametrize("prompt", [1, 3, 4, 5, 15, 16, 19, 20, 21, 52, 131, 132, 133, 148, 149])
def test_a_prompt_of_any_length_gives_dense_attention(worker, prompt):
    """Shorter than the sinks (4), than the window (16), at the edges of segments (128)."""
    kv = Kv(shape_of(), prompt + 80, seed=prompt)
    ring = worker.allocate_ring(1 << 20)
    sequence = worker.register(kv.shape, method_of(budget_tokens=ALL), prompt + 80, SERVED)
    worker.ingest(sequence, ring, kv, prompt, chunk=50)
    assert worker.wait(sequence).cut == max(4, prompt - 16)
    for position in range(prompt, prompt + 80):
        decode_step(worker, sequence, kv, position)


@pytest.mark.parametrize("dtype", [v1.DTYPE_FP16, v1.DTYPE_BF16, v1.DTYPE_FP32])
@pytest.mark.parametrize("head_dim, kv_heads, group", [
    (64, 3, 3), (96, 1, 1), (128, 2, 4), (256, 1, 16)])
def test_every_shape_and_dtype_gives_dense_attention(worker, dtype, head_dim, kv_heads, group):
    shape = shape_of(layers=2, kv_heads=kv_heads, group=group, head_dim=head_dim, dtype=dtype)
    kv = Kv(shape, 340, seed=head_dim)
    ring = worker.allocate_ring(1 << 20)
    sequence = worker.register(shape, method_of(budget_tokens=ALL), 340, SERVED)
    worker.ingest(sequence, ring, kv, 300, chunk=64)
    worker.wait(sequence)
    for position in range(300, 340):
        decode_step(worker, sequence, kv, position)


@pytest.mark.parametrize("changed", [
    {"sink_tokens": 0}, {"min_window_tokens": 0}, {"sink_tokens": 0, "min_window_tokens": 0},
    {"center_keys": True}, {"group": v1.GROUP_RULE_MAX}, {"group": v1.GROUP_RULE_MEAN},
    {"tokens_per_cluster": 1}, {"tokens_per_cluster": 512}, {"decode_segment_tokens": 1},
    {"prompt_segment_tokens": 1, "tokens_per_cluster": 1}, {"estimate": True},
    {"decode_segment_tokens": 7, "prompt_segment_tokens": 33, "sink_tokens": 9}])
def test_every_method_gives_dense_attention_when_it_retrieves_all(worker, changed):
    kv = Kv(shape_of(), 280)
    ring = worker.allocate_ring(1 << 20)
    method = method_of(**{"budget_tokens": ALL, **changed})
    sequence = worker.register(kv.shape, method, 280, SERVED)
    worker.ingest(sequence, ring, kv, 200, chunk=48)
    worker.wait(sequence)
    for position in range(200, 280):
        decode_step(worker, sequence, kv, position)
        worker.wait(sequence, length=position + 1)


@pytest.mark.parametrize("budget", [1, 7, 32, 100])
def test_a_small_budget_attends_to_sinks_selection_and_window(daemon, worker, budget):
    """And takes clusters whole but the last: min(budget, candidates) tokens per KV head."""
    kv = Kv(shape_of(kv_heads=2, group=3), 460)
    ring = worker.allocate_ring(1 << 20)
    sequence = worker.register(kv.shape, method_of(budget_tokens=128), 460, SERVED)
    worker.ingest(sequence, ring, kv, 400, chunk=100)
    worker.wait(sequence)
    metrics = {"hit": 0, "missed": 0, "hit_tokens": 0, "missed_tokens": 0, "bytes": 0}
    for position in range(400, 460):
        for layer in range(2):
            result = worker.fetch(sequence, kv, position, layer, budget=budget, want_output=True,
                                  want_selection=True)
            attended = attended_positions(result, kv, position, 4, budget)
            for rows in attended:
                assert len(rows) == 4 + min(budget, result.cut - 4) + position + 1 - result.cut
            check_output(result, kv, layer, position, attended)
            assert result.hit_clusters + result.missed_clusters >= 1
            metrics["hit"] += result.hit_clusters
            metrics["missed"] += result.missed_clusters
            # Clusters count whole, and a missed one is gathered whole: K and V, fp16.
            assert result.hit_clusters <= result.hit_tokens
            assert result.missed_tokens * 2 * 64 * 2 == result.gathered_bytes
            metrics["hit_tokens"] += result.hit_tokens
            metrics["missed_tokens"] += result.missed_tokens
            metrics["bytes"] += result.gathered_bytes
        # As the segment rules allow: the newest that is clustered leaves at least 16 exact.
        worker.wait(sequence, length=position + 1)
    mode = '{gpu="host",mode="served"}'
    # The events come on another stream than the answers.
    worker.wait_for(lambda: worker.published.get(sequence.id, [(0, 0)])[-1][1] == 384 + 32, 20)
    found = daemon.metrics()
    assert found[f"clusterkv_cache_clusters_hit_total{mode}"] == metrics["hit"]
    assert found[f"clusterkv_cache_clusters_missed_total{mode}"] == metrics["missed"]
    assert found[f"clusterkv_cache_tokens_hit_total{mode}"] == metrics["hit_tokens"]
    assert found[f"clusterkv_cache_tokens_missed_total{mode}"] == metrics["missed_tokens"]
    assert found["clusterkv_host_gathered_bytes_total"] == metrics["bytes"]


def test_a_small_budget_beats_the_window_alone(worker):
    """The selection is worth something: queries look for topics that lie all over the context."""
    kv = Kv(shape_of(group=1), 640)
    ring = worker.allocate_ring(1 << 20)
    sequence = worker.register(kv.shape, method_of(budget_tokens=64), 640, SERVED)
    worker.ingest(sequence, ring, kv, 600)
    worker.wait(sequence)
    errors = {"chosen": [], "newest": []}
    for position in range(600, 610):
        for layer in range(2):
            result = worker.fetch(sequence, kv, position, layer, want_output=True,
                                  want_selection=True)
            exact, _ = kv.attention(layer, position)
            newest = np.r_[0:4, result.cut - 64:position + 1]
            window, _ = kv.attention(layer, position, [newest] * 2)
            errors["chosen"].append(relative_error(output_of(result, kv.shape)[0], exact))
            errors["newest"].append(relative_error(window, exact))
    assert np.mean(errors["chosen"]) < 0.5 * np.mean(errors["newest"]), errors


def test_a_batch_is_the_same_as_one_by_one(worker):
    ring = worker.allocate_ring(1 << 20)
    kvs = [Kv(shape_of(), 330, seed=i) for i in range(5)]
    pairs = []
    for kv in kvs:
        pair = [worker.register(kv.shape, method_of(budget_tokens=40), 330, SERVED)
                for _ in range(2)]
        for sequence in pair:
            worker.ingest(sequence, ring, kv, 300, chunk=60)
            worker.wait(sequence)
        pairs.append(pair)
    for position in range(300, 320):
        for layer in range(2):
            batch = worker.call("FetchClusters", layer=layer, want_output=True,
                                want_selection=True, items=[
                                    kv.fetch_item(pair[0].id, position, layer)
                                    for kv, pair in zip(kvs, pairs)]).results
            for kv, pair, together in zip(kvs, pairs, batch):
                alone = worker.fetch(pair[1], kv, position, layer, want_output=True,
                                     want_selection=True)
                assert together.sequence_id == pair[0].id
                assert together.selected_positions == alone.selected_positions
                np.testing.assert_allclose(output_of(together, kv.shape)[0],
                                           output_of(alone, kv.shape)[0], rtol=1e-5, atol=1e-6)
        # Both must see the same segments in the next step.
        for pair in pairs:
            for sequence in pair:
                worker.wait(sequence, length=position + 1)


def test_tensors_can_lie_in_an_arena(worker):
    kv = Kv(shape_of(), 310)
    ring = worker.allocate_ring(1 << 20)
    arena = worker.allocate_ring(8192)
    sequence = worker.register(kv.shape, method_of(budget_tokens=ALL), 310, SERVED)
    worker.ingest(sequence, ring, kv, 300)
    worker.wait(sequence)
    output_bytes = kv.shape.q_heads * (kv.shape.head_dim + 1) * 4
    for position in range(300, 310):
        for layer in range(2):
            item, offset = kv.fetch_item(sequence.id, position, layer), 0
            for tensor in (item.q, item.k, item.v):
                data = tensor.inline
                arena.memory[offset:offset + len(data)] = data
                tensor.arena.CopyFrom(v1.ArenaRange(arena_id=arena.arena_id, offset=offset,
                                                    bytes=len(data)))
                offset += 1024
            item.output_arena.CopyFrom(v1.ArenaRange(arena_id=arena.arena_id, offset=4096,
                                                     bytes=output_bytes))
            result = worker.call("FetchClusters", layer=layer, items=[item],
                                 want_output=True).results[0]
            assert not result.output and not result.lse
            numbers = arena.memory[4096:4096 + output_bytes]
            result.output, result.lse = numbers[:-4 * 4], numbers[-4 * 4:]
            check_output(result, kv, layer, position)


def test_a_full_window_is_refused_and_the_sequence_goes_on(worker):
    """No lag allowed: the step after a full segment needs that segment to be published."""
    kv = Kv(shape_of(), 400)
    ring = worker.allocate_ring(1 << 20)
    sequence = worker.register(kv.shape, method_of(
        budget_tokens=ALL, decode_segment_tokens=8, min_window_tokens=8, window_lag_segments=0,
        kmeans_iterations=100), 400, SERVED)
    worker.ingest(sequence, ring, kv, 100)
    worker.wait(sequence)
    for position in range(100, 400):
        while True:
            try:
                result = worker.fetch(sequence, kv, position, 0)
                break
            except grpc.RpcError as error:
                assert error.code() == Code.RESOURCE_EXHAUSTED, error
                assert "window of 16 tokens is full" in error.details()
                worker.wait(sequence, length=position)
        check_output(result, kv, 0, position)
        check_output(worker.fetch(sequence, kv, position, 1), kv, 1, position)
    assert "beyond max_tokens 400" in refused(Code.OUT_OF_RANGE, worker.fetch, sequence,
                                              Kv(shape_of(), 401), 400, 0)


def test_sequences_of_a_session_come_and_go(worker):
    """Sequences of other lengths overlap in time; the host memory of one becomes another's."""
    rng = np.random.default_rng(11)
    ring = worker.allocate_ring(1 << 19)
    live = []
    for i in range(14):
        prompt = int(rng.integers(1, 500))
        kv = Kv(shape_of(), prompt + 40, seed=100 + i)
        sequence = worker.register(kv.shape, method_of(budget_tokens=ALL), prompt + 40, SERVED)
        worker.ingest(sequence, ring, kv, prompt, chunk=int(rng.integers(1, 200)))
        live.append([sequence, kv, prompt])
        for entry in live:
            worker.wait(entry[0])
            for _ in range(4):
                if entry[2] < entry[1].tokens:
                    decode_step(worker, entry[0], entry[1], entry[2])
                    entry[2] += 1
        while len(live) > 4:
            worker.release(live.pop(int(rng.integers(len(live))))[0])
    assert not worker.failed


# --- A full host pool ---------------------------------------------------------------------------

def test_a_full_pool_refuses_a_range_and_takes_it_once_there_is_room(start_daemon):
    """Growth beyond what was reserved is all or nothing; the range can be sent again."""
    daemon = start_daemon({"host-memory": "4mb", "host-chunk": "2mb"})
    kv = Kv(shape_of(), 3000)
    method = method_of(budget_tokens=4096)
    with Worker(daemon.address) as worker:
        ring = worker.allocate_ring(1 << 20)
        first, second = (worker.register(kv.shape, method, 3000, SERVED, reserve_tokens=1)
                         for _ in range(2))
        worker.ingest(first, ring, kv, 1600, chunk=400)
        worker.wait(first)
        worker.wait_for(lambda: not ring.lent)

        def admitted():
            """What a range changes; publishing goes on beside it."""
            return [(info.ingested_tokens, info.host_bytes) for info in worker.mine()]
        while True:
            before = admitted()
            try:
                worker.ingest_range(second, ring, kv, 0, 2, 100)
                worker.wait_for(lambda: not ring.lent)
            except grpc.RpcError as error:
                assert error.code() == Code.RESOURCE_EXHAUSTED, error
                assert "host pool" in error.details()
                with worker.changed:
                    ring.lent.pop()
                break
        assert second.accepted[0] >= 400 and second.accepted[0] < 2900
        assert admitted() == before
        # Who runs is not taken apart.
        decode_step(worker, first, kv, 1600)
        worker.release(first)
        worker.ingest_range(second, ring, kv, 0, 2, 100, last=True)
        worker.wait(second)
        for position in range(second.accepted[0], second.accepted[0] + 20):
            decode_step(worker, second, kv, position)
    daemon.wait_until_free()
