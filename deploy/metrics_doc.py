#!/usr/bin/env python3
"""Writes deploy/METRICS.md from a scrape of a daemon that has worked: names, types, labels and help
are the daemon's own.

    deploy/metrics_doc.py http://127.0.0.1:9464/metrics > deploy/METRICS.md

tests/observability checks that the file is what this writes, and that the identities hold.
"""

import re
import sys
import urllib.request

SECTIONS = [
    ("Cluster cache", ("clusterkv_cache_", "clusterkv_host_gathered", "clusterkv_decode",
                       "clusterkv_ignored")),
    ("Served fetch and transfers", ("clusterkv_fetch_", "clusterkv_transfer_")),
    ("Audit of decode steps", ("clusterkv_audit_",)),
    ("Ingest", ("clusterkv_ingest",)),
    ("Clustering", ("clusterkv_cluster", "clusterkv_publish", "clusterkv_pending")),
    ("Memory", ("clusterkv_host_pool_", "clusterkv_grant", "clusterkv_gpu_")),
    ("Sessions, sequences, limits", ("clusterkv_session", "clusterkv_sequence", "clusterkv_reject",
                                     "clusterkv_refused", "clusterkv_waiting")),
    ("Calls", ("grpc_server_",)),
    ("Health and build", ("clusterkv_ready", "clusterkv_draining", "clusterkv_uptime",
                          "clusterkv_device_age", "clusterkv_device_plugin",
                          "clusterkv_tick", "clusterkv_thread_",
                          "clusterkv_build")),
    ("Process", ("process_",)),
]

LABELS = {
    "gpu": "UUID of the daemon's GPU; `host` with backend host",
    "mode": "who fetches: `direct` (the worker), `served` (the daemon)",
    "layer": "index of a layer in its sequence, `0` to `127`; `127` is all from there on",
    "state": "of memory or jobs, as the help says",
    "phase": "of a served fetch: `queue`, `prepare`, `gather`, `attend`, `finish`",
    "direction": "`d2h`, `h2d`",
    "reason": "why a session ended: `closed`, `connection_lost`, `worker_died`, `attach_timeout`, "
              "`protocol_error`, `daemon_stopped`, `grant_revoked`",
    "limit": "`sessions`, `sequences`, `arenas`, `host_memory`, `gpu_memory`, `ring_credits`, "
             "`waiters`",
    "thread": "`core`, `stage`, `cluster`, `serve`, `memory`, `audit`",
    "grpc_service": "`clusterkv.v1.ClusterKv`",
    "grpc_method": "each method of it",
    "grpc_type": "`unary`, `bidi_stream`",
    "grpc_code": "each canonical code, in the spelling of gRPC's exporters (`OK`, `Canceled`, …)",
    "version": "of the build",
    "backend": "`host`, `cuda`",
}

# (left, relation, right): hold at every scrape.
IDENTITIES = [
    *((f"clusterkv_cache_{unit}_selected_total", "==",
       f"clusterkv_cache_{unit}_hit_total + clusterkv_cache_{unit}_missed_total")
      for unit in ("clusters", "tokens", "bytes")),
    *((f"sum without (layer) (clusterkv_cache_layer_clusters_{what}_total)", "==",
       f"clusterkv_cache_clusters_{what}_total") for what in ("hit", "missed")),
    ("clusterkv_cache_tokens_missed_total", ">=", "clusterkv_cache_tokens_evicted_total"),
    ("clusterkv_cache_bytes_missed_total", ">=", "clusterkv_cache_bytes_evicted_total"),
    ("clusterkv_sessions", "==", "clusterkv_sessions_started_total - "
                                 "sum without (reason) (clusterkv_sessions_ended_total)"),
    ("clusterkv_sequences", "==",
     "sum without (mode) (clusterkv_sequences_registered_total) - "
     "sum without (mode) (clusterkv_sequences_released_total)"),
    ("clusterkv_ingested_tokens_total", ">=", "clusterkv_clustered_tokens_total"),
    ("sum without (state) (clusterkv_host_pool_bytes)", ">=", "clusterkv_host_pool_extent_bytes"),
    ("clusterkv_fetch_seconds_count", "==",
     'sum without (phase) (clusterkv_fetch_phase_seconds_count{phase="queue"})'),
    ("grpc_server_started_total", ">=", "sum without (grpc_code) (grpc_server_handled_total)"),
    ("grpc_server_handling_seconds_count", "==",
     "sum without (grpc_code) (grpc_server_handled_total)"),
]

HEAD = """# Metrics

What `/metrics` of the admin port has. Made by `deploy/metrics_doc.py` from the daemon itself.

All of a scrape is derived from one snapshot, so what is said here holds at every scrape. Counters
never fall while the daemon lives, whatever sessions do. What sequences count themselves (the cluster
cache, decode steps) is sampled once a second and once more before a sequence is freed. The number of
series is bounded: no label has a session, a sequence or a client in it. A scrape waits for no device
and no thread.

Ratios are left to PromQL: `deploy/prometheus/clusterkv.rules.yaml` records those that matter.
"""


def families(text):
    """[(name, type, help, sorted label names)] in the order of the scrape."""
    found, helps = {}, {}
    for line in text.splitlines():
        if line.startswith("# HELP "):
            _, _, name, told = (line + " ").split(" ", 3)
            helps[name] = told.strip()
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            found[name] = (kind, set())
        elif line:
            series, labels = re.match(r"(\w+)(?:\{(.*)\})?", line).groups()
            name = series if series in found else re.sub("_(bucket|sum|count)$", "", series)
            found[name][1].update(re.findall(r'(\w+)="', labels or ""))
    return [(name, kind, helps[name], sorted(labels - {"le"}))
            for name, (kind, labels) in found.items()]


def unit(name):
    for part in ("seconds", "bytes", "tokens", "ratio"):
        if f"_{part}" in name:
            return part
    return "1"


def markdown(text):
    known = families(text)
    rest = {name for name, *_ in known}
    out = [HEAD]
    for title, prefixes in SECTIONS:
        out += [f"## {title}", "", "| name | type | unit | labels | what |", "|---|---|---|---|---|"]
        for name, kind, told, labels in known:
            if name not in rest or not name.startswith(prefixes):
                continue
            rest.remove(name)
            assert all(label in LABELS for label in labels), (name, labels)
            names = " ".join(f"`{label}`" for label in labels)
            shown = "sum and count" if kind == "summary" else kind
            out.append(f"| `{name}` | {shown} | {unit(name)} | {names} | {told} |")
        out.append("")
    assert not rest, f"no section has {sorted(rest)}"
    out += ["## Labels", "", "| label | values |", "|---|---|"]
    out += [f"| `{label}` | {values} |" for label, values in LABELS.items()]
    out += ["", "## Identities", "", "Checked against a running daemon in `tests/observability`.",
            "", "```"]
    out += [f"{left} {relation} {right}" for left, relation, right in IDENTITIES]
    return "\n".join(out + ["```"]) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with urllib.request.urlopen(sys.argv[1], timeout=10) as answer:
        sys.stdout.write(markdown(answer.read().decode()))
