#!/usr/bin/env python3
"""The Grafana dashboards, as code: writes clusterkv-{overview,cache,node}.json beside this file.

    deploy/grafana/dashboards.py            writes them
    deploy/grafana/dashboards.py --check    exit code 1 if they are not as this would write them

A panel is (title, unit, [(query, legend)], options). In queries $who picks the instances that the
reader has chosen; $__rate_interval is Grafana's.
"""

import json
import pathlib
import sys

WHO = 'job=~"$job",instance=~"$instance"'
HERE = pathlib.Path(__file__).resolve().parent
COLUMNS, HEIGHT = 24, 7


def panel(title, unit, *queries, about="", kind="timeseries", width=8, stack=False, most=None):
    return {"title": title, "unit": unit, "about": about, "kind": kind, "width": width,
            "stack": stack, "most": most,
            "queries": [(query.replace("$who", WHO), legend) for query, legend in queries]}


def rate(metric, labels="", by="instance"):
    inside = "$who" + ("," + labels if labels else "")
    return f"sum by ({by}) (rate({metric}{{{inside}}}[$__rate_interval]))"


def quantile(share, metric, labels="", by="instance"):
    inside = "$who" + ("," + labels if labels else "")
    return (f"histogram_quantile({share}, sum by (le, {by}) "
            f"(rate({metric}_bucket{{{inside}}}[$__rate_interval])))")


def mean(metric, by):
    return f"{rate(metric + '_sum', by=by)} / ({rate(metric + '_count', by=by)} > 0)"


OVERVIEW = ("clusterkv overview", "clusterkv-overview", [
    ("Is it well", [
        panel("Ready", "none", ("sum(clusterkv_ready{$who})", "ready"), kind="stat", width=4),
        panel("Open sessions", "none", ("sum(clusterkv_sessions{$who})", "sessions"), kind="stat",
              width=4),
        panel("Sequences", "none", ("sum(clusterkv_sequences{$who})", "sequences"), kind="stat",
              width=4),
        panel("Least time since start", "s", ("min(clusterkv_uptime_seconds{$who})", "uptime"),
              kind="stat", width=4),
        panel("Hit ratio, 5 min", "percentunit",
              ("min(gpu_mode:clusterkv_cache_hit:ratio_rate5m{$who})", "least"), kind="stat",
              width=4),
        panel("Versions", "none", ("count by (version) (clusterkv_build_info{$who})",
                                   "{{version}}"), kind="stat", width=4),
    ]),
    ("Work", [
        panel("Decode steps", "ops", (rate("clusterkv_decode_steps_total", by="mode"), "{{mode}}"),
              about="Tokens that all sequences decode in a second."),
        panel("Prompts", "ops", (rate("clusterkv_ingested_tokens_total"), "{{instance}} ingested"),
              (rate("clusterkv_clustered_tokens_total"), "{{instance}} clustered"),
              about="Tokens in a second. Clustered lags behind ingested and catches up."),
        panel("Hit ratio of the cluster cache", "percentunit",
              ("gpu_mode:clusterkv_cache_hit:ratio_rate5m{$who}", "{{instance}} {{mode}}"),
              ("gpu_mode:clusterkv_cache_hit_worst_layer:ratio_rate5m{$who}",
               "{{instance}} {{mode}}, worst layer"), most=1),
        panel("Quality of audited steps", "percentunit",
              ("instance:clusterkv_audit_recall:ratio_rate15m{$who}", "{{instance}} recall"),
              ("instance:clusterkv_audit_missed_mass:ratio_rate15m{$who}",
               "{{instance}} attention missed"), most=1,
              about="Against exact attention, means over query heads. Needs an audit rate in the "
                    "clients. Missed attention is what counts."),
        panel("Host pool", "bytes", ("sum by (state) (clusterkv_host_pool_bytes{$who})",
                                     "{{state}}"), stack=True),
        panel("Gathered from the host store", "Bps",
              (rate("clusterkv_host_gathered_bytes_total"), "{{instance}}")),
    ]),
    ("Requests", [
        panel("Calls", "reqps", (rate("grpc_server_handled_total", by="grpc_method"),
                                 "{{grpc_method}}")),
        panel("Calls by status", "reqps",
              (rate("grpc_server_handled_total", 'grpc_code!="OK"', by="grpc_code"),
               "{{grpc_code}}"), about="All but OK."),
        panel("Time of a call, 99 %", "s",
              ("max by (grpc_method) (method:grpc_server_handling_seconds:p99_rate5m{$who})",
               "{{grpc_method}}"), about="Over 5 minutes; Session and WaitPublished last by design."),
        panel("Served layer", "s", (quantile(0.5, "clusterkv_fetch_seconds"), "{{instance}} median"),
              (quantile(0.99, "clusterkv_fetch_seconds"), "{{instance}} 99 %")),
        panel("Refused for want of", "ops", (rate("clusterkv_refused_total", by="limit"),
                                             "{{limit}}")),
        panel("Ends of sessions", "ops", (rate("clusterkv_sessions_ended_total", by="reason"),
                                          "{{reason}}")),
        panel("Failed sequences", "ops", (rate("clusterkv_sequences_failed_total", by="mode"),
                                          "{{mode}}")),
        panel("Attaches refused", "ops", (rate("clusterkv_rejected_attaches_total"),
                                          "{{instance}}")),
        panel("Samples ignored", "ops", (rate("clusterkv_ignored_samples_total"), "{{instance}}"),
              about="Counters that a worker has damaged."),
    ]),
])

CACHE = ("clusterkv cache", "clusterkv-cache", [
    ("Hits", [
        panel("Hit ratio", "percentunit",
              ("gpu_mode:clusterkv_cache_hit:ratio_rate5m{$who}", "{{instance}} {{mode}}"), most=1),
        panel("Hit ratio of the worst layer", "percentunit",
              ("gpu_mode:clusterkv_cache_hit_worst_layer:ratio_rate5m{$who}",
               "{{instance}} {{mode}}"), most=1,
              about="A mean over layers hides the layer that every step waits for."),
        panel("The five worst layers", "percentunit",
              ("bottomk(5, min by (layer) (layer:clusterkv_cache_hit:ratio_rate5m{$who}))",
               "layer {{layer}}"), most=1),
        panel("Clusters selected", "ops",
              (rate("clusterkv_cache_clusters_hit_total", by="mode"), "{{mode}} hit"),
              (rate("clusterkv_cache_clusters_missed_total", by="mode"), "{{mode}} missed"),
              stack=True),
        panel("Tokens selected", "ops",
              (rate("clusterkv_cache_tokens_hit_total", by="mode"), "{{mode}} hit"),
              (rate("clusterkv_cache_tokens_missed_total", by="mode"), "{{mode}} missed"),
              stack=True),
        panel("Bytes selected", "Bps",
              (rate("clusterkv_cache_bytes_hit_total", by="mode"), "{{mode}} hit"),
              (rate("clusterkv_cache_bytes_missed_total", by="mode"), "{{mode}} missed"),
              stack=True),
    ]),
    ("Room", [
        panel("Used of the cluster caches", "percentunit",
              ("gpu_mode:clusterkv_cache_used:ratio{$who}", "{{instance}} {{mode}}"), most=1),
        panel("Cluster caches", "bytes",
              ("sum by (mode, state) (clusterkv_cache_bytes{$who})", "{{mode}} {{state}}"),
              stack=True),
        panel("Evicted", "Bps", (rate("clusterkv_cache_bytes_evicted_total", by="mode"),
                                 "{{mode}}"),
              about="Near the missed bytes once the caches are full. High and the hit ratio low: "
                    "the cache is too small for the budget."),
    ]),
    ("Shape of the work", [
        panel("Tokens of a selected cluster", "none",
              (rate("clusterkv_cache_tokens_selected_total", by="mode") + " / ("
               + rate("clusterkv_cache_clusters_selected_total", by="mode") + " > 0)", "{{mode}}")),
        panel("Gathered for a decode step", "bytes",
              (rate("clusterkv_host_gathered_bytes_total") + " / ("
               + rate("clusterkv_decode_steps_total") + " > 0)", "{{instance}}")),
        panel("Clusters selected in a decode step", "none",
              (rate("clusterkv_cache_clusters_selected_total", by="mode") + " / ("
               + rate("clusterkv_decode_steps_total", by="mode") + " > 0)", "{{mode}}"),
              about="Over all layers and KV heads."),
    ]),
])

NODE = ("clusterkv node", "clusterkv-node", [
    ("Threads", [
        panel("Busy", "percentunit", (rate("clusterkv_thread_busy_seconds_total", by="thread"),
                                      "{{thread}}"), most=1),
        panel("Age of the task that runs", "s",
              ("max by (thread) (clusterkv_thread_task_age_seconds{$who})", "{{thread}}")),
        panel("Tasks that wait", "none", ("sum by (thread) (clusterkv_thread_waiting_tasks{$who})",
                                          "{{thread}}")),
        panel("Tasks done", "ops", (rate("clusterkv_thread_tasks_total", by="thread"),
                                    "{{thread}}")),
        panel("Ages of the watchdogs", "s", ("max(clusterkv_device_age_seconds{$who})", "device"),
              ("max(clusterkv_tick_age_seconds{$who})", "core")),
        panel("Ready, draining", "none", ("min(clusterkv_ready{$who})", "ready"),
              ("max(clusterkv_draining{$who})", "draining")),
    ]),
    ("Ingest and clustering", [
        panel("From a range to its credit", "s",
              (quantile(0.5, "clusterkv_ingest_range_seconds", by="job"), "median"),
              (quantile(0.99, "clusterkv_ingest_range_seconds", by="job"), "99 %")),
        panel("Rings", "bytes", ("sum by (state) (clusterkv_ingest_ring_bytes{$who})", "{{state}}"),
              stack=True),
        panel("Ranges in flight, calls that wait", "none",
              ("sum(clusterkv_ingest_ranges_in_flight{$who})", "ranges"),
              ("sum(clusterkv_waiting_calls{$who})", "WaitPublished")),
        panel("Bytes ingested", "Bps", (rate("clusterkv_ingested_bytes_total"), "{{instance}}")),
        panel("From a segment to its publishing", "s",
              (quantile(0.5, "clusterkv_publish_seconds", by="job"), "median"),
              ("max(instance:clusterkv_publish_seconds:p99_rate5m{$who})", "99 %, 5 min")),
        panel("Segments", "none", ("sum(clusterkv_pending_segments{$who})", "pending"),
              (rate("clusterkv_published_segments_total", by="job"), "published in a second")),
        panel("Jobs of clustering", "none",
              ("sum by (state) (clusterkv_cluster_jobs{$who})", "{{state}}")),
        panel("Age of the oldest job", "s", ("max(clusterkv_cluster_oldest_job_seconds{$who})",
                                             "oldest")),
        panel("Keys clustered", "ops", (rate("clusterkv_cluster_keys_total", by="job"), "keys")),
        panel("Time of one k-means", "s",
              (rate("clusterkv_cluster_seconds_total", by="job") + " / ("
               + rate("clusterkv_cluster_problems_total", by="job") + " > 0)", "of a problem")),
        panel("Problems in a batch, iterations of a problem", "none",
              (rate("clusterkv_cluster_problems_total", by="job") + " / ("
               + rate("clusterkv_cluster_batches_total", by="job") + " > 0)", "problems"),
              (rate("clusterkv_cluster_iterations_total", by="job") + " / ("
               + rate("clusterkv_cluster_problems_total", by="job") + " > 0)", "iterations")),
        panel("Keys in a cluster", "none",
              (rate("clusterkv_cluster_keys_total", by="job") + " / ("
               + rate("clusterkv_cluster_clusters_total", by="job") + " > 0)", "mean")),
    ]),
    ("Served fetch and transfers", [
        panel("Served layer, mean time of its phases", "s",
              (mean("clusterkv_fetch_phase_seconds", "phase"), "{{phase}}"), stack=True),
        panel("Sequences in a call", "none",
              (rate("clusterkv_fetch_sequences_total", by="job") + " / ("
               + rate("clusterkv_fetch_seconds_count", by="job") + " > 0)", "mean")),
        panel("Audits", "ops", (rate("clusterkv_audit_steps_total", by="job"), "made"),
              (rate("clusterkv_audit_skipped_total", by="job"), "skipped"),
              (rate("clusterkv_audit_seconds_total", by="job"), "cores used"),
              about="--audit-share bounds the cores used."),
        panel("Rate of transfers", "Bps",
              (rate("clusterkv_transfer_bytes_total", by="direction") + " / ("
               + rate("clusterkv_transfer_seconds_total", by="direction") + " > 0)",
               "{{direction}}"), about="While they run."),
    ]),
    ("Memory and process", [
        panel("Host pool", "bytes", ("sum by (state) (clusterkv_host_pool_bytes{$who})",
                                     "{{state}}"),
              ("sum(clusterkv_host_pool_pinned_bytes{$who})", "pinned")),
        panel("Within the lent chunks", "bytes",
              ('sum(clusterkv_host_pool_bytes{$who,state="used"})', "lent"),
              ("sum(clusterkv_host_pool_extent_bytes{$who})", "hold tokens")),
        panel("Largest free piece", "bytes",
              ("min(clusterkv_host_pool_largest_free_extent_bytes{$who})", "largest"),
              ("max(clusterkv_host_pool_chunk_bytes{$who})", "a chunk")),
        panel("Grants of the device plugin", "bytes",
              ("sum by (instance) (clusterkv_grant_bytes{$who})", "{{instance}}"),
              about="Host memory promised to containers that asked for clusterkv.io/host-gib."),
        panel("Device memory of sessions", "bytes",
              ("sum by (gpu) (clusterkv_gpu_arena_bytes{$who})", "{{gpu}}"),
              ("sum by (gpu) (clusterkv_gpu_arena_limit_bytes{$who})", "{{gpu}}, bound")),
        panel("CPU", "percentunit", (rate("process_cpu_seconds_total", by="job"), "cores")),
        panel("Memory of the process", "bytes", ("sum(process_resident_memory_bytes{$who})",
                                                 "resident"),
              ("sum(process_virtual_memory_bytes{$who})", "virtual")),
        panel("File descriptors", "none", ("sum(process_open_fds{$who})", "open"),
              ("sum(process_max_fds{$who})", "most")),
        panel("Threads", "none", ("sum(process_threads{$who})", "threads")),
        panel("Time of a scrape", "s", ("max(scrape_duration_seconds{$who})", "scrape")),
    ]),
])

DASHBOARDS = {"clusterkv-overview.json": OVERVIEW, "clusterkv-cache.json": CACHE,
              "clusterkv-node.json": NODE}
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def variable(name, query, several):
    return {"name": name, "label": name, "type": "query", "datasource": SOURCE, "refresh": 2,
            "query": {"query": query, "refId": name}, "definition": query, "sort": 1,
            "includeAll": several, "multi": several, **({"allValue": ".*"} if several else {}),
            "current": {"selected": True, "text": ["All"], "value": ["$__all"]} if several else {}}


def panel_json(number, made, x, y):
    defaults = {"unit": made["unit"], "min": 0}
    if made["most"] is not None:
        defaults["max"] = made["most"]
    options = {}
    if made["kind"] == "timeseries":
        defaults["custom"] = {"lineWidth": 1, "fillOpacity": 20 if made["stack"] else 0,
                              "showPoints": "never",
                              "stacking": {"mode": "normal" if made["stack"] else "none"}}
        options = {"legend": {"displayMode": "list", "placement": "bottom"},
                   "tooltip": {"mode": "multi"}}
    else:
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "textMode": "auto"}
    return {"id": number, "type": made["kind"], "title": made["title"],
            "description": made["about"], "datasource": SOURCE,
            "gridPos": {"x": x, "y": y, "w": made["width"], "h": HEIGHT},
            "fieldConfig": {"defaults": defaults, "overrides": []}, "options": options,
            "targets": [{"refId": chr(ord("A") + i), "expr": query, "legendFormat": legend,
                         "datasource": SOURCE}
                        for i, (query, legend) in enumerate(made["queries"])]}


def dashboard_json(title, uid, rows):
    panels, y = [], 0
    for name, made in rows:
        panels.append({"id": len(panels) + 1, "type": "row", "title": name, "collapsed": False,
                       "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1}, "panels": []})
        y, x = y + 1, 0
        for one in made:
            if x + one["width"] > COLUMNS:
                x, y = 0, y + HEIGHT
            panels.append(panel_json(len(panels) + 1, one, x, y))
            x += one["width"]
        y += HEIGHT
    one_node = uid == "clusterkv-node"
    variables = [{"name": "datasource", "label": "datasource", "type": "datasource",
                  "query": "prometheus", "current": {}},
                 variable("job", "label_values(clusterkv_build_info, job)", True),
                 variable("instance", 'label_values(clusterkv_build_info{job=~"$job"}, instance)',
                          not one_node)]
    return {"title": title, "uid": uid, "tags": ["clusterkv"], "schemaVersion": 38, "version": 1,
            "editable": True, "timezone": "browser", "refresh": "30s",
            "time": {"from": "now-1h", "to": "now"}, "templating": {"list": variables},
            "links": [{"type": "dashboards", "tags": ["clusterkv"], "title": "clusterkv",
                       "asDropdown": True, "keepTime": True, "includeVars": True}],
            "panels": panels}


def main():
    stale = []
    for name, (title, uid, rows) in DASHBOARDS.items():
        text = json.dumps(dashboard_json(title, uid, rows), indent=1, ensure_ascii=False) + "\n"
        path = HERE / name
        if "--check" in sys.argv[1:]:
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                stale.append(name)
        else:
            path.write_text(text, encoding="utf-8")
    if stale:
        print(f"not as dashboards.py writes them: {', '.join(stale)}", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
