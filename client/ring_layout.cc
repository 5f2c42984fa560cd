#include "client/ring_layout.h"

#include <algorithm>

#include "gpu/segment_plan.h"

namespace clusterkv::client {

std::vector<IngestRange> SplitRange(const IngestRange& range, const gpu::Shape& shape,
                                    const gpu::MethodOptions& method, uint64_t piece_bytes) {
  const uint64_t token_bytes = RangeLayout(shape, 1, 1).bytes();
  const uint64_t layer_bytes = token_bytes * range.count;
  uint32_t layers = 1;
  uint32_t tokens = range.count;
  if (layer_bytes <= piece_bytes) {
    layers =
        static_cast<uint32_t>(std::min<uint64_t>(range.layer_count, piece_bytes / layer_bytes));
  } else {
    tokens = static_cast<uint32_t>(std::clamp<uint64_t>(piece_bytes / token_bytes, 1, range.count));
  }
  const gpu::RangeKind kind =
      range.end_of_prompt ? gpu::RangeKind::kPromptEnd : gpu::RangeKind::kPrompt;
  const uint64_t most = gpu::kMaxSegmentsOfRange / shape.kv_heads;  // of all layers
  while (tokens > 1 && gpu::SegmentsOfRange(method, kind, tokens) > most) {
    tokens = (tokens + 1) / 2;
    layers = 1;
  }
  layers = static_cast<uint32_t>(
      std::clamp<uint64_t>(most / gpu::SegmentsOfRange(method, kind, tokens), 1, layers));
  std::vector<IngestRange> pieces;
  for (uint32_t layer = 0; layer < range.layer_count; layer += layers) {
    for (uint32_t token = 0; token < range.count;) {
      const uint32_t count = std::min(tokens, range.count - token);
      pieces.push_back({.position = range.position + token,
                        .count = count,
                        .layer_begin = range.layer_begin + layer,
                        .layer_count = std::min(layers, range.layer_count - layer),
                        .end_of_prompt = range.end_of_prompt && token + count == range.count});
      token += count;
    }
  }
  return pieces;
}

}  // namespace clusterkv::client
