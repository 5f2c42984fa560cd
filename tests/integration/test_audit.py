"""The daemon's audit of direct steps against an outsider's arithmetic: a replay whose every step is
audited, and float64 attention over the trace with what it says it selected."""

import os
import struct
import subprocess
import sys

import grpc
import numpy as np
import pytest

from daemon import START_SECONDS, clean_environment, program
from dense import Kv, method_of, shape_of
from wire import ROOT, v1
from worker import DIRECT, SERVED, Worker

sys.path.insert(0, str(ROOT / "tests" / "reference"))
from check_replay import cut_schedule, read_safetensors, read_trace  # noqa: E402

TRACE = ROOT / "tests" / "traces" / "smollm2-135m-moby-dick.safetensors"
# Fewer steps than the client queues audits, so that none is dropped.
STEPS, BUDGET, SINKS, WINDOW, SEGMENT = 24, 128, 16, 64, 320


def replay(daemon, folder, *options, budgets=(BUDGET,)):
    dump = os.path.join(folder, "dump.safetensors")
    subprocess.run(
        [program("clusterkv-replay"), TRACE, "--connect", daemon.address, "--methods", "clusterkv",
         "--budgets", ",".join(map(str, budgets)), "--steps", str(STEPS), "--set",
         f"sink_tokens={SINKS}", "--set", f"min_window={WINDOW}", "--set",
         f"decode_segment_tokens={SEGMENT}", "--dump-outputs", dump, *options],
        check=True, env=clean_environment(), stdout=subprocess.DEVNULL, timeout=10 * START_SECONDS)
    return read_safetensors(dump)[0]


def exact(trace, selected):
    """(mean recall, mean missed mass) over the audited: at step t of the layer t % layers."""
    layers = sorted(trace.layers)
    cuts = cut_schedule(trace.prompt_tokens, STEPS, SINKS, WINDOW, SEGMENT)
    recalls, missed = [], []
    for t, cut in enumerate(cuts):
        index = layers[t % len(layers)]
        layer = trace.layers[index]
        length = trace.prompt_tokens + t + 1
        for head in range(layer.q.shape[1]):
            kv_head = head // (layer.q.shape[1] // layer.k.shape[1])
            scores = layer.k[:length, kv_head] @ layer.q[t, head] * trace.scale
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            chosen = selected[f"layers.{index}.selected"][t, kv_head]
            chosen = chosen[chosen >= 0]
            best = SINKS + np.argsort(-scores[SINKS:cut], kind="stable")[:len(chosen)]
            recalls.append(len(np.intersect1d(chosen, best)) / len(chosen))
            candidates = np.setdiff1d(np.arange(SINKS, cut), chosen)
            missed.append(weights[candidates].sum())
    return len(recalls), np.mean(recalls), np.mean(missed)


def test_recall_and_missed_mass_are_those_of_exact_attention(start_daemon, tmp_path):
    daemon = start_daemon({"host-memory": "256mb", "audit-share": "1"})
    selected = replay(daemon, tmp_path, "--audit-rate", "1")
    heads, recall, missed = exact(read_trace(str(TRACE)), selected)
    metrics = daemon.metrics()
    assert metrics["clusterkv_audit_steps_total"] == STEPS
    assert metrics["clusterkv_audit_skipped_total"] == 0
    for name, expected, tolerance in (("recall", recall, 2e-3), ("missed_mass", missed, 1e-4)):
        count = metrics[f"clusterkv_audit_{name}_ratio_count"]
        assert count == heads
        found = metrics[f"clusterkv_audit_{name}_ratio_sum"] / count
        assert abs(found - expected) < tolerance, (name, found, expected)
    assert 0.2 < recall < 1 and 0 < missed < 0.5, "nothing to be seen in this trace"


def test_audits_stay_within_their_share(start_daemon, tmp_path):
    daemon = start_daemon({"host-memory": "256mb", "audit-share": "0"})
    replay(daemon, tmp_path, "--audit-rate", "0.5")
    metrics = daemon.metrics()
    assert metrics["clusterkv_audit_steps_total"] == 0
    assert metrics["clusterkv_audit_skipped_total"] == STEPS / 2


def test_all_batches_share_one_ring(start_daemon, tmp_path):
    """One arena is the ingest ring; the other must do for the batches of both sequences."""
    daemon = start_daemon({"host-memory": "256mb", "audit-share": "1",
                           "max-arenas-per-session": "2"})
    replay(daemon, tmp_path, "--audit-rate", "1", budgets=(BUDGET, BUDGET + 1))
    metrics = daemon.metrics()
    audited = metrics["clusterkv_audit_steps_total"] + metrics["clusterkv_audit_skipped_total"]
    assert audited == 2 * STEPS


def test_without_room_for_a_ring_steps_go_on_unaudited(start_daemon, tmp_path):
    daemon = start_daemon({"host-memory": "256mb", "audit-share": "1",
                           "max-arenas-per-session": "1"})
    replay(daemon, tmp_path, "--audit-rate", "1")
    metrics = daemon.metrics()
    assert metrics["clusterkv_audit_steps_total"] == 0
    assert metrics['clusterkv_refused_total{limit="arenas"}'] == 1


def test_served_steps_are_not_audited_by_the_worker(start_daemon, tmp_path):
    daemon = start_daemon({"host-memory": "256mb", "audit-share": "1"})
    replay(daemon, tmp_path, "--audit-rate", "1", "--mode", "served")
    assert daemon.metrics()["clusterkv_audit_steps_total"] == 0


BUDGET_TOKENS, PROMPT, CUT = 4, 150, 134  # all of the prompt but min_window_tokens
SLOT_AT, SLOT_BYTES = 1 << 16, 832
INVALID, MISSING = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND


def slot(cut=CUT, counts=(2, 1), clusters=((0, 1, 0, 0), (2, 0, 0, 0)),
         takes=((1, 1, 0, 0), (3, 0, 0, 0))):
    """Two KV heads, four query heads of 64, choices of a budget of 4; each on 64 bytes."""
    parts = (struct.pack("<I", cut), bytes(4 * 4), bytes(4 * 64 * 2), struct.pack("<2I", *counts),
             *(struct.pack("<8I", *rows[0], *rows[1]) for rows in (clusters, takes)))
    data = b"".join(part + bytes(-len(part) % 64) for part in parts)
    assert len(data) == SLOT_BYTES
    return data


class Audited:
    """A direct sequence with its prompt published, and a slot in its ring."""

    def __init__(self, worker):
        self.worker, self.ring = worker, worker.allocate_ring(1 << 17)
        shape = shape_of()
        self.sequence = worker.register(shape, method_of(budget_tokens=BUDGET_TOKENS), 256, DIRECT)
        worker.ingest(self.sequence, self.ring, Kv(shape, PROMPT), PROMPT, chunk=32)
        assert worker.wait(self.sequence).cut == CUT

    def audit(self, data, place=None, **changed):
        self.ring.memory[SLOT_AT:SLOT_AT + SLOT_BYTES] = data
        where = v1.ArenaRange(**{"arena_id": self.ring.arena_id, "offset": SLOT_AT,
                                 "bytes": SLOT_BYTES, **(place or {})})
        return self.worker.call("AuditStep", **{"sequence_id": self.sequence.id, "layer": 1,
                                                "slot": where, **changed}).audited

    def refused(self, code, message, *args, **changed):
        with pytest.raises(grpc.RpcError) as caught:
            self.audit(*args, **changed)
        assert caught.value.code() == code, caught.value.details()
        assert message in caught.value.details()


def test_bad_audits_are_refused(start_daemon):
    daemon = start_daemon({"audit-share": "1"})
    with Worker(daemon.address) as worker:
        audited = Audited(worker)
        assert audited.audit(slot())
        for place, code, message in (
                ({"arena_id": 0}, INVALID, "slot: arena_id is 0"),
                ({"arena_id": 99}, MISSING, "no arena 99"),
                ({"arena_id": audited.sequence.reply.state_arena_id}, MISSING, "no arena"),
                ({"bytes": 0}, INVALID, "slot has 0 bytes, not 832"),
                ({"bytes": 2**64 - 1}, INVALID, "not 832"),
                ({"offset": 4}, INVALID, "offset 4 is not a multiple"),
                ({"offset": (1 << 17) - 64}, INVALID, "do not lie in arena"),
                ({"offset": 2**64 - 64}, INVALID, "do not lie in arena")):
            audited.refused(code, message, slot(), place)
        for layer in (2, 2**32 - 1):
            audited.refused(INVALID, f"layer {layer} of 2", slot(), layer=layer)
        audited.refused(MISSING, "no sequence 99", slot(), sequence_id=99)
        for lie, message in (
                (slot(cut=5), "cut 5 is not where a published segment ends"),
                (slot(cut=2**32 - 1), "is not where a published segment ends"),
                (slot(counts=(5, 0)), "KV head 0: 5 clusters"),
                (slot(counts=(0, 2**32 - 1)), "KV head 1: 4294967295 clusters"),
                (slot(clusters=((2**32 - 1,) * 4, (0,) * 4)), "KV head 0: cluster 4294967295 of"),
                (slot(clusters=((1,) * 4, (0,) * 4)), "is there twice"),
                (slot(takes=((5,) * 4, (0,) * 4)), "more tokens than the budget"),
                (slot(takes=((1,) * 4, (2**32 - 1,) * 4)), "KV head 1: cluster 2: rows"),
                (b"\xff" * SLOT_BYTES, "cut 4294967295")):
            audited.refused(INVALID, message, lie)
        assert audited.audit(slot(cut=method_of().sink_tokens, counts=(0, 0))), "nothing was there"
        assert daemon.metrics()["clusterkv_audit_steps_total"] == 2


def test_another_sessions_arena_is_no_place_for_a_slot(start_daemon):
    daemon = start_daemon({"audit-share": "1"})
    with Worker(daemon.address) as other, Worker(daemon.address) as worker:
        audited = Audited(worker)
        foreign = max(other.allocate_ring(1 << 12).arena_id for _ in range(3))
        audited.refused(MISSING, f"no arena {foreign}", slot(), {"arena_id": foreign})


def test_a_request_without_a_slot_is_refused(start_daemon):
    daemon = start_daemon()
    with Worker(daemon.address) as worker, pytest.raises(grpc.RpcError) as caught:
        worker.call("AuditStep", sequence_id=1)
    assert caught.value.code() == INVALID, caught.value.details()


def test_a_served_sequence_has_nothing_to_audit(start_daemon):
    daemon = start_daemon()
    with Worker(daemon.address) as worker:
        sequence = worker.register(shape_of(), method_of(), 64, SERVED)
        with pytest.raises(grpc.RpcError) as caught:
            worker.call("AuditStep", sequence_id=sequence.id, slot=v1.ArenaRange(arena_id=1))
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
