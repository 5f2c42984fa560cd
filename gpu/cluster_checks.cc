#include "gpu/cluster_checks.h"

#include <limits>

#include "absl/strings/str_cat.h"

namespace clusterkv::gpu {

absl::Status CheckStage(const StageArgs& args) {
  if (args.range == nullptr) return absl::InvalidArgumentError("the ring range is null");
  if (uint64_t{args.first_token} + args.count > args.range_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("tokens ", args.first_token, " + ", args.count,
                                                   " of a range of ", args.range_tokens));
  }
  if (args.destinations.size() != size_t{args.layer_count} * args.kv_heads) {
    return absl::InvalidArgumentError(absl::StrCat(args.destinations.size(), " destinations for ",
                                                   args.layer_count, " layers of ", args.kv_heads,
                                                   " KV heads"));
  }
  for (const std::byte* destination : args.destinations) {
    if (destination == nullptr) return absl::InvalidArgumentError("a destination is null");
  }
  return absl::OkStatus();
}

absl::Status CheckCluster(const ClusterArgs& args) {
  if (args.head_dim == 0) return absl::InvalidArgumentError("head_dim is 0");
  if (args.iterations == 0) return absl::InvalidArgumentError("iterations is 0");
  if (args.largest_cluster_tokens == 0) {
    return absl::InvalidArgumentError("largest_cluster_tokens is 0");
  }
  for (size_t i = 0; i < args.problems.size(); ++i) {
    const ClusterProblem& problem = args.problems[i];
    if (problem.clusters < 1 || problem.clusters > problem.tokens) {
      return absl::InvalidArgumentError(absl::StrCat("problem ", i, ": clusters is ",
                                                     problem.clusters, "; allowed: 1 to tokens, ",
                                                     problem.tokens));
    }
    if (problem.rows == nullptr || problem.order == nullptr || problem.sizes == nullptr ||
        problem.centroids == nullptr || problem.value_means == nullptr ||
        problem.count == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat("problem ", i, ": a pointer is null"));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckPermute(const PermuteArgs& args) {
  if (args.row_bytes == 0) return absl::InvalidArgumentError("row_bytes is 0");
  for (size_t i = 0; i < args.problems.size(); ++i) {
    const PermuteProblem& problem = args.problems[i];
    if (problem.rows == nullptr || problem.destination == nullptr || problem.workspace == nullptr ||
        problem.order == nullptr || problem.positions == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat("problem ", i, ": a pointer is null"));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckPublish(const PublishArgs& args) {
  if (args.state == nullptr || args.layout == nullptr) {
    return absl::InvalidArgumentError("the state or its layout is null");
  }
  const StateLayout& layout = *args.layout;
  if (args.segment >= layout.max_segments) {
    return absl::InvalidArgumentError(
        absl::StrCat("segment is ", args.segment, "; allowed: below ", layout.max_segments));
  }
  if (args.segment_begin < layout.sink_tokens || args.segment_end <= args.segment_begin ||
      args.segment_end > layout.max_tokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("segment [", args.segment_begin, ", ", args.segment_end, ") must be within [",
                     layout.sink_tokens, ", ", layout.max_tokens, ")"));
  }
  const size_t heads = layout.head_index(layout.layers, 0);
  if (args.problems.size() != heads) {
    return absl::InvalidArgumentError(
        absl::StrCat(args.problems.size(), " problems for ", heads, " (layer, KV head) pairs"));
  }
  const uint64_t run_units =
      uint64_t{args.segment_end - args.segment_begin} * layout.row_bytes() / 16;
  for (size_t i = 0; i < heads; ++i) {
    const PublishProblem& problem = args.problems[i];
    if (problem.sizes == nullptr || problem.centroids == nullptr ||
        problem.value_means == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat("problem ", i, ": a pointer is null"));
    }
    if (uint64_t{problem.cluster_begin} + problem.cluster_count > layout.max_clusters) {
      return absl::InvalidArgumentError(
          absl::StrCat("problem ", i, ": clusters ", problem.cluster_begin, " + ",
                       problem.cluster_count, "; allowed: ", layout.max_clusters));
    }
    if (problem.rows_offset + run_units > std::numeric_limits<uint32_t>::max()) {
      return absl::InvalidArgumentError(
          absl::StrCat("problem ", i, ": rows_offset is ", problem.rows_offset, ", too large"));
    }
  }
  return absl::OkStatus();
}

}  // namespace clusterkv::gpu
