// What the work threads do: served fetch, ingest, clustering, transfers.
#include <utility>

#include "service/metric_sections.h"

namespace clusterkv::service {

void AddFetchMetrics(MetricFamilies& families, const DaemonStatus& status) {
  const FetchStatus& fetch = status.fetch;
  families.Distribution(
      "clusterkv_fetch_seconds",
      "Served fetches (FetchClusters that succeeded), from the call to the reply.", fetch.call);
  families.Counter("clusterkv_fetch_sequences_total", "Sequences in those calls.", fetch.sequences);
  for (size_t i = 0; i < fetch.phases.size(); ++i) {
    families.Summary(
        "clusterkv_fetch_phase_seconds",
        "Phases of served fetches. queue and finish of every call; prepare (inputs, append, "
        "select), gather and attend (and staging the tokens) of one call in 64, which waits "
        "between them.",
        fetch.phases[i], {{"phase", kFetchPhaseNames[i]}});
  }
  const std::pair<const char*, const TransferStatus*> directions[] = {{"d2h", &status.d2h},
                                                                      {"h2d", &status.h2d}};
  for (const auto& [direction, transfer] : directions) {
    families.Counter("clusterkv_transfer_bytes_total",
                     "Bytes whose move was timed. d2h: into the host store, staging and permuting. "
                     "h2d: gathered for one served fetch in 64.",
                     transfer->bytes, {{"direction", direction}});
  }
  for (const auto& [direction, transfer] : directions) {
    families.Counter("clusterkv_transfer_seconds_total", "Time that those moves took.",
                     transfer->seconds, {{"direction", direction}});
  }
}

void AddAuditMetrics(MetricFamilies& families, const DaemonStatus& status) {
  const AuditStatus& audit = status.audit;
  families.Counter("clusterkv_audit_steps_total",
                   "Layers of direct steps that were compared with exact attention.", audit.steps);
  families.Counter("clusterkv_audit_skipped_total",
                   "Audits that workers offered and --audit-share left no time for.",
                   audit.skipped);
  families.Counter("clusterkv_audit_seconds_total", "Time spent in audits.", audit.seconds);
  families.Summary(
      "clusterkv_audit_recall_ratio",
      "Recall of a query head: which share of its own best tokens was chosen, as many as "
      "were chosen.",
      {.count = audit.recall_heads, .sum = audit.recall_sum});
  families.Summary(
      "clusterkv_audit_missed_mass_ratio",
      "Attention mass that a query head missed: the share of its exact softmax that lies on "
      "tokens which were not attended. Not known with the method's estimate.",
      {.count = audit.mass_heads, .sum = audit.missed_mass_sum});
}

void AddIngestMetrics(MetricFamilies& families, const DaemonStatus& status) {
  const IngestStatus& ingest = status.ingest;
  families.Counter("clusterkv_ingested_tokens_total",
                   "Tokens whose K and V of all layers have arrived.", status.ingested_tokens);
  families.Counter("clusterkv_ingested_bytes_total", "Bytes of K and V that have arrived.",
                   ingest.bytes);
  families.Distribution("clusterkv_ingest_range_seconds",
                        "From the handing over of a range of a ring to the return of its credit.",
                        ingest.range);
  families.Gauge("clusterkv_ingest_ranges_in_flight",
                 "Ranges handed over whose credit has not been returned.", ingest.ranges_in_flight);
  for (const auto& [state, bytes] :
       {std::pair("used", ingest.ring_used_bytes),
        std::pair("free", ingest.ring_bytes - ingest.ring_used_bytes)}) {
    families.Gauge("clusterkv_ingest_ring_bytes",
                   "Rings of the workers: arenas that a range was handed over in.", bytes,
                   {{"state", state}});
  }
}

void AddClusteringMetrics(MetricFamilies& families, const DaemonStatus& status) {
  const ClusteringStatus& clustering = status.clustering;
  families.Counter("clusterkv_clustered_tokens_total", "Tokens of published segments.",
                   status.clustered_tokens);
  families.Counter("clusterkv_published_segments_total", "Segments published.",
                   status.published_segments);
  families.Distribution("clusterkv_publish_seconds",
                        "From a segment's first layer being complete to its publishing.",
                        clustering.publish);
  families.Gauge("clusterkv_pending_segments", "Segments with a complete layer, not published yet.",
                 clustering.pending_segments);
  families.Counter("clusterkv_cluster_problems_total", "K-means of one (layer, KV head) done.",
                   clustering.problems);
  families.Counter("clusterkv_cluster_keys_total", "Keys that they grouped.", clustering.tokens);
  families.Counter("clusterkv_cluster_clusters_total", "Clusters that they found.",
                   clustering.clusters);
  families.Counter("clusterkv_cluster_iterations_total",
                   "Iterations that they took; one that has converged ends early.",
                   clustering.iterations);
  families.Counter("clusterkv_cluster_seconds_total", "Time spent in clustering.",
                   clustering.seconds);
  families.Counter("clusterkv_cluster_batches_total", "Batches of clustering begun.",
                   clustering.batches);
  for (const auto& [state, jobs] : {std::pair("waiting", clustering.waiting_jobs),
                                    std::pair("running", clustering.running_jobs)}) {
    families.Gauge("clusterkv_cluster_jobs", "Layers of segments that are to be clustered.", jobs,
                   {{"state", state}});
  }
  families.Gauge("clusterkv_cluster_oldest_job_seconds",
                 "Time since the oldest of them was ready; 0: there is none.",
                 clustering.oldest_job_seconds);
}

}  // namespace clusterkv::service
