// Where the K and V rows of a sequence lie in the host store, before and after clustering.
//
// A piece holds the rows of one segment of one layer: an extent for each KV head. Tokens are staged
// into it in position order; clustering permutes it in place. So pieces are cut as segments are:
//
//   prompt, end unknown   | P | P | P ...            from the sinks on
//   prompt ended at n     | P | P | rest |           up to decode_begin = max(sinks, n - window)
//                                        | D | D ... the window's tokens are moved here
//
// An extent is [positions: u32 x capacity, to 256 bytes][rows: K then V, x capacity].
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gpu/method_options.h"
#include "gpu/shape.h"
#include "service/session_memory.h"

namespace clusterkv::service {

struct Piece {
  uint32_t begin = 0;     // position of its first token
  uint32_t capacity = 0;  // tokens
  uint64_t rows_offset = 0;
  std::vector<Extent> heads;
};

// A contiguous piece of rows of one (layer, head).
struct RowSpan {
  std::byte* data = nullptr;
  uint32_t position = 0;
  uint32_t tokens = 0;
};

struct RowCopy {
  const std::byte* source = nullptr;
  std::byte* destination = nullptr;
  size_t bytes = 0;
};

// Not thread-safe.
class PieceTable {
 public:
  PieceTable(SessionMemory& memory, const gpu::Shape& shape, const gpu::MethodOptions& method,
             uint32_t max_tokens);

  // Host memory for the first `tokens` of a sequence of max_tokens, in chunks of the pool.
  static double ChunksNeeded(const gpu::Shape& shape, const gpu::MethodOptions& method,
                             uint32_t tokens, uint32_t max_tokens, uint64_t chunk_bytes);
  // Of the largest extent there can be.
  static uint64_t LargestExtentBytes(const gpu::Shape& shape, const gpu::MethodOptions& method,
                                     uint32_t max_tokens);

  // What admitting a range of tokens takes; made by Plan, taken by Commit.
  struct Admission {
    std::vector<std::vector<Piece>> added;   // per layer of the range
    std::vector<std::vector<Piece>> decode;  // per layer, for the prompt's end
    std::vector<RowCopy> moves;              // once the range has been staged
    std::optional<uint32_t> decode_begin;    // set at the prompt's end
  };

  // Whether there is a place for every position up to `end`: then Plan has nothing to take.
  bool Covers(uint32_t layer, uint32_t end) const {
    return Geometry(layers_[layer], static_cast<uint32_t>(layers_[layer].pieces.size())).begin >=
           end;
  }
  // Takes the memory for positions up to `end` of the layers; with `prompt_end` also for moving
  // the window's tokens. Errors: RESOURCE_EXHAUSTED, and nothing is taken.
  absl::StatusOr<Admission> Plan(uint32_t layer_begin, uint32_t layer_count, uint32_t end,
                                 bool prompt_end);
  // Gives back what Plan took.
  void Discard(const Admission& admission);
  // `spans` gets the places of positions [begin, end) of every (layer, head) of the range, before
  // the moves of a prompt's end.
  void Commit(Admission admission, uint32_t layer_begin, uint32_t begin, uint32_t end,
              std::vector<std::vector<RowSpan>>& spans);
  // Appends where K and V of one token lie, for each head. REQUIRES: it is no sink, and covered.
  void AppendPlaces(uint32_t layer, uint32_t position, std::vector<std::byte*>& places) const;
  // The moves are done: frees what they left behind.
  void FinishPromptEnd(uint32_t layer);

  const Piece& piece(uint32_t layer, uint32_t segment) const {
    return layers_[layer].pieces[segment];
  }
  std::byte* rows(const Piece& piece, uint32_t head) const {
    return memory_.data(piece.heads[head]) + piece.rows_offset;
  }
  std::byte* positions(const Piece& piece, uint32_t head) const {
    return memory_.data(piece.heads[head]);
  }

  uint64_t bytes() const { return bytes_; }
  void FreeAll();

 private:
  struct Layer {
    std::vector<Piece> pieces;
    std::vector<Piece> retired;  // source of moves in flight
    std::optional<uint32_t> decode_begin;
    uint32_t prompt_pieces = 0;  // once decode_begin is known
  };

  Piece Geometry(const Layer& layer, uint32_t index) const;
  absl::StatusOr<Piece> Allocate(Piece geometry);
  void Free(const Piece& piece);
  absl::Status PlanLayer(uint32_t layer, uint32_t end, bool prompt_end, std::vector<Piece>& added,
                         std::vector<Piece>& decode, std::vector<RowCopy>& moves);
  static std::vector<Piece>::const_iterator PieceOf(const std::vector<Piece>& pieces,
                                                    uint32_t position);
  void AppendSpans(const std::vector<Piece>& pieces, uint32_t head, uint32_t begin, uint32_t end,
                   std::vector<RowSpan>& spans) const;

  SessionMemory& memory_;
  const gpu::Shape shape_;
  const gpu::MethodOptions method_;
  const uint32_t max_tokens_;
  std::vector<Layer> layers_;
  uint64_t bytes_ = 0;
};

}  // namespace clusterkv::service
