// Where segments begin and end: pure arithmetic that daemon, client and tests share.
//
//   0      sinks                                        cut              length
//   |------|=== prompt segment ===|=== ... ===|= tail =|-- window --------|
//          '------ published, clustered --------------'  exact, >= min_window
//
// Prompt segments count from the sinks on; the tail beyond the last full one becomes one shorter
// segment, except the newest min_window tokens. While decoding, whenever
// length - cut >= min_window + decode_segment, the oldest decode_segment tokens become a segment.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "gpu/method_options.h"

namespace clusterkv::gpu {

struct Segment {
  uint32_t begin = 0;  // position of the first token
  uint32_t end = 0;    // one past the last
  uint32_t tokens() const { return end - begin; }
  bool operator==(const Segment&) const = default;
};

// Not thread-safe.
class SegmentPlan {
 public:
  explicit SegmentPlan(const MethodOptions& method);

  // The next segment that may be clustered, given that positions [0, arrived) are here; nullopt
  // if it is not complete yet. `prompt_tokens` is the prompt's length once it is known.
  std::optional<Segment> Next(uint32_t arrived, std::optional<uint32_t> prompt_tokens) const;
  // Takes the segment that Next returned as done.
  void Advance(const Segment& segment);

  // First position that no segment holds yet (never below sink_tokens).
  uint32_t cut() const { return cut_; }

 private:
  MethodOptions method_;
  uint32_t cut_;
};

// All segments of a sequence of `length` tokens whose first `prompt_tokens` were prompt.
std::vector<Segment> AllSegments(const MethodOptions& method, uint32_t prompt_tokens,
                                 uint32_t length);

// How many segments a sequence of `length` tokens has, without making a list of what may be
// millions. While the prompt's length is unknown, or above `length`, only its full segments count:
// what follows them depends on tokens that are still to come.
uint32_t SegmentCount(const MethodOptions& method, std::optional<uint32_t> prompt_tokens,
                      uint32_t length);

// The most segments, counted for each (layer, KV head), that one range of tokens may begin when it
// is handed to the daemon. Each takes host memory of its own, and one thread places it for
// everybody.
constexpr uint32_t kMaxSegmentsOfRange = 65'536;
enum class RangeKind { kPrompt, kPromptEnd, kDecoded };
// How many segments of one (layer, KV head) begin within `tokens` tokens, at most. A prompt's end
// also begins the decode segments that the window's tokens will be in.
uint64_t SegmentsOfRange(const MethodOptions& method, RangeKind kind, uint32_t tokens);

// Bounds that the state layout reserves for a sequence of at most max_tokens tokens.
uint32_t MaxSegments(const MethodOptions& method, uint32_t max_tokens);
// k of k-means for a segment: ceil(tokens / tokens_per_cluster).
uint32_t ClustersOfSegment(const MethodOptions& method, uint32_t tokens);
// The same after splits of clusters above largest_cluster_tokens().
uint32_t MaxClustersOfSegment(const MethodOptions& method, uint32_t tokens);
uint32_t MaxClusters(const MethodOptions& method, uint32_t max_tokens);

}  // namespace clusterkv::gpu
