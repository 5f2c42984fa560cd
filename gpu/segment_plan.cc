#include "gpu/segment_plan.h"

#include <algorithm>

namespace clusterkv::gpu {
namespace {

// Tokens of a sequence that can ever be in a segment.
uint64_t ClusterableTokens(const MethodOptions& method, uint32_t tokens) {
  const uint64_t exact = uint64_t{method.sink_tokens} + method.min_window_tokens;
  return tokens > exact ? tokens - exact : 0;
}

}  // namespace

SegmentPlan::SegmentPlan(const MethodOptions& method) : method_(method), cut_(method.sink_tokens) {}

std::optional<Segment> SegmentPlan::Next(uint32_t arrived,
                                         std::optional<uint32_t> prompt_tokens) const {
  const uint64_t window = method_.min_window_tokens;
  const uint64_t full_end = uint64_t{cut_} + method_.prompt_segment_tokens;
  // While the prompt's length is unknown, all that arrived is prompt, so a full segment found
  // then is also found once the length is known.
  if (!prompt_tokens.has_value() || full_end + window <= *prompt_tokens) {
    if (arrived < full_end + window) return std::nullopt;
    return Segment{cut_, static_cast<uint32_t>(full_end)};
  }
  if (cut_ + window < *prompt_tokens) {
    if (arrived < *prompt_tokens) return std::nullopt;
    return Segment{cut_, static_cast<uint32_t>(*prompt_tokens - window)};
  }
  const uint64_t decode_end = uint64_t{cut_} + method_.decode_segment_tokens;
  if (arrived < decode_end + window) return std::nullopt;
  return Segment{cut_, static_cast<uint32_t>(decode_end)};
}

void SegmentPlan::Advance(const Segment& segment) { cut_ = std::max(cut_, segment.end); }

std::vector<Segment> AllSegments(const MethodOptions& method, uint32_t prompt_tokens,
                                 uint32_t length) {
  std::vector<Segment> segments;
  SegmentPlan plan(method);
  while (const std::optional<Segment> next = plan.Next(length, prompt_tokens)) {
    segments.push_back(*next);
    plan.Advance(*next);
  }
  return segments;
}

uint32_t SegmentCount(const MethodOptions& method, std::optional<uint32_t> prompt_tokens,
                      uint32_t length) {
  const uint64_t prompt_segment = method.prompt_segment_tokens;
  const uint64_t clusterable = ClusterableTokens(method, length);
  if (!prompt_tokens.has_value() || length < *prompt_tokens) {
    return static_cast<uint32_t>(clusterable / prompt_segment);
  }
  // The prompt's, with its tail; decode segments begin where they end.
  const uint64_t of_prompt = ClusterableTokens(method, *prompt_tokens);
  return static_cast<uint32_t>((of_prompt + prompt_segment - 1) / prompt_segment +
                               (clusterable - of_prompt) / method.decode_segment_tokens);
}

uint64_t SegmentsOfRange(const MethodOptions& method, RangeKind kind, uint32_t tokens) {
  const auto segments = [](uint64_t count, uint32_t length) {
    return (count + length - 1) / length;
  };
  if (kind == RangeKind::kDecoded) return segments(tokens, method.decode_segment_tokens);
  return segments(tokens, method.prompt_segment_tokens) +
         (kind == RangeKind::kPrompt
              ? 0
              : segments(method.min_window_tokens, method.decode_segment_tokens));
}

uint32_t MaxSegments(const MethodOptions& method, uint32_t max_tokens) {
  // All but the prompt's tail have one of two sizes; the worst case is only the smaller.
  const uint64_t smallest =
      std::max<uint32_t>(1, std::min(method.prompt_segment_tokens, method.decode_segment_tokens));
  return static_cast<uint32_t>(ClusterableTokens(method, max_tokens) / smallest + 1);
}

uint32_t ClustersOfSegment(const MethodOptions& method, uint32_t tokens) {
  return static_cast<uint32_t>((uint64_t{tokens} + method.tokens_per_cluster - 1) /
                               method.tokens_per_cluster);
}

uint32_t MaxClustersOfSegment(const MethodOptions& method, uint32_t tokens) {
  // A cluster of s tokens becomes ceil(s / largest) pieces: at most s / largest more than one.
  const uint64_t pieces =
      uint64_t{ClustersOfSegment(method, tokens)} + tokens / method.largest_cluster_tokens();
  return static_cast<uint32_t>(std::min<uint64_t>(tokens, pieces));
}

uint32_t MaxClusters(const MethodOptions& method, uint32_t max_tokens) {
  // The sum of MaxClustersOfSegment over any split of the tokens into MaxSegments segments.
  const uint64_t tokens = ClusterableTokens(method, max_tokens);
  const uint64_t clusters = tokens / method.tokens_per_cluster + MaxSegments(method, max_tokens) +
                            tokens / method.largest_cluster_tokens();
  return static_cast<uint32_t>(std::clamp<uint64_t>(clusters, 1, std::max<uint64_t>(1, tokens)));
}

}  // namespace clusterkv::gpu
