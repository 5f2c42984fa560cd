"""The daemon's audit of direct steps against an outsider's arithmetic: a replay whose every step is
audited, and float64 attention over the trace with what it says it selected."""

import os
import subprocess
import sys

import grpc
import numpy as np
import pytest

from daemon import START_SECONDS, clean_environment, program
from dense import method_of, shape_of
from wire import ROOT, v1
from worker import DIRECT, SERVED, Worker

sys.path.insert(0, str(ROOT / "tests" / "reference"))
from check_replay import cut_schedule, read_safetensors, read_trace  # noqa: E402

TRACE = ROOT / "tests" / "traces" / "smollm2-135m-moby-dick.safetensors"
# Fewer steps than the client queues audits, so that none is dropped.
STEPS, BUDGET, SINKS, WINDOW, SEGMENT = 24, 128, 16, 64, 320


def replay(daemon, folder, *options):
    dump = os.path.join(folder, "dump.safetensors")
    subprocess.run(
        [program("clusterkv-replay"), TRACE, "--connect", daemon.address, "--methods", "clusterkv",
         "--budgets", str(BUDGET), "--steps", str(STEPS), "--set", f"sink_tokens={SINKS}", "--set",
         f"min_window={WINDOW}", "--set", f"decode_segment_tokens={SEGMENT}", "--dump-outputs", dump,
         *options],
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


def test_served_steps_are_not_audited_by_the_worker(start_daemon, tmp_path):
    daemon = start_daemon({"host-memory": "256mb", "audit-share": "1"})
    replay(daemon, tmp_path, "--audit-rate", "1", "--mode", "served")
    assert daemon.metrics()["clusterkv_audit_steps_total"] == 0


@pytest.mark.parametrize("changed, code", [
    ({"layer": 2}, grpc.StatusCode.INVALID_ARGUMENT),
    ({"cut": 5}, grpc.StatusCode.INVALID_ARGUMENT),
    ({"queries": b"short"}, grpc.StatusCode.INVALID_ARGUMENT),
    ({"lse": b"\0" * 15}, grpc.StatusCode.INVALID_ARGUMENT),
    ({"selected_positions": [0]}, grpc.StatusCode.INVALID_ARGUMENT),
    ({"selected_positions": [4, -2]}, grpc.StatusCode.INVALID_ARGUMENT),
    ({"selected_positions": [2**31 - 1] * 2}, grpc.StatusCode.INVALID_ARGUMENT),
    ({"sequence_id": 99}, grpc.StatusCode.NOT_FOUND),
])
def test_bad_audits_are_refused(start_daemon, changed, code):
    daemon = start_daemon({"audit-share": "1"})
    with Worker(daemon.address) as worker:
        sequence = worker.register(shape_of(), method_of(), 64, DIRECT)
        good = {"sequence_id": sequence.id, "layer": 1, "cut": method_of().sink_tokens,
                "queries": b"\0" * (4 * 64 * 2), "lse": b"\0" * 16, "selected_positions": [-1, -1]}
        request = v1.AuditStepRequest(session=worker.ref, **good)
        assert worker.stub.AuditStep(request).audited, "nothing is published, and that is fine"
        with pytest.raises(grpc.RpcError) as caught:
            worker.stub.AuditStep(v1.AuditStepRequest(session=worker.ref, **{**good, **changed}))
        assert caught.value.code() == code, caught.value.details()


def test_a_served_sequence_has_nothing_to_audit(start_daemon):
    daemon = start_daemon()
    with Worker(daemon.address) as worker:
        sequence = worker.register(shape_of(), method_of(), 64, SERVED)
        with pytest.raises(grpc.RpcError) as caught:
            worker.stub.AuditStep(v1.AuditStepRequest(session=worker.ref, sequence_id=sequence.id))
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
