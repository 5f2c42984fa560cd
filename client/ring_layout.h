// A range of the ingest ring, [layer][K, V][token][kv_head][head_dim] without a gap, and how a
// prompt is cut into ranges.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "client/client.h"
#include "gpu/method_options.h"
#include "gpu/shape.h"

namespace clusterkv::client {

// Offsets in bytes from the start of the range.
class RangeLayout {
 public:
  RangeLayout(const gpu::Shape& shape, uint32_t layers, uint32_t tokens)
      : row_bytes_(size_t{shape.head_dim} * gpu::SizeOf(shape.dtype)),
        token_bytes_(shape.kv_heads * row_bytes_),
        layers_(layers),
        tokens_(tokens) {}

  size_t row_bytes() const { return row_bytes_; }      // K or V of one token of one head
  size_t token_bytes() const { return token_bytes_; }  // the same of all heads
  uint32_t tokens() const { return tokens_; }
  // Blocks of `tokens` tokens: K and V of each layer.
  size_t blocks() const { return size_t{2} * layers_; }
  size_t block_bytes() const { return tokens_ * token_bytes_; }
  size_t bytes() const { return blocks() * block_bytes(); }
  size_t k_offset(uint32_t layer) const { return 2 * size_t{layer} * block_bytes(); }
  size_t v_offset(uint32_t layer) const { return k_offset(layer) + block_bytes(); }

 private:
  size_t row_bytes_, token_bytes_;
  uint32_t layers_, tokens_;
};

// Cuts a range of a prompt into pieces of at most `piece_bytes` that begin at most
// gpu::kMaxSegmentsOfRange segments (or one token of one layer): as many whole layers as fit, else
// as many tokens of one layer. In the order of layers, then of positions.
std::vector<IngestRange> SplitRange(const IngestRange& range, const gpu::Shape& shape,
                                    const gpu::MethodOptions& method, uint64_t piece_bytes);

}  // namespace clusterkv::client
