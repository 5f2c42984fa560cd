#include "service/piece_table.h"

#include <algorithm>
#include <utility>

#include "gpu/status_macros.h"

namespace clusterkv::service {
namespace {

uint64_t RowsOffset(uint32_t capacity) {
  return ExtentAllocator::RoundUp(uint64_t{capacity} * sizeof(uint32_t));
}

uint64_t ExtentBytes(const gpu::Shape& shape, uint32_t capacity) {
  return ExtentAllocator::RoundUp(RowsOffset(capacity) + capacity * shape.row_bytes());
}

uint32_t DecodeBegin(const gpu::MethodOptions& method, uint32_t prompt_tokens) {
  const uint32_t window_begin = prompt_tokens - std::min(prompt_tokens, method.min_window_tokens);
  return std::max(method.sink_tokens, window_begin);
}

}  // namespace

PieceTable::PieceTable(SessionMemory& memory, const gpu::Shape& shape,
                       const gpu::MethodOptions& method, uint32_t max_tokens)
    : memory_(memory),
      shape_(shape),
      method_(method),
      max_tokens_(max_tokens),
      layers_(shape.layers) {}

uint64_t PieceTable::LargestExtentBytes(const gpu::Shape& shape, const gpu::MethodOptions& method,
                                        uint32_t max_tokens) {
  const uint32_t longest = std::max(method.prompt_segment_tokens, method.decode_segment_tokens);
  return ExtentBytes(shape, std::min(longest, max_tokens));
}

double PieceTable::ChunksNeeded(const gpu::Shape& shape, const gpu::MethodOptions& method,
                                uint32_t tokens, uint32_t max_tokens, uint64_t chunk_bytes) {
  if (tokens <= method.sink_tokens) return 0;
  const uint32_t rest = tokens - method.sink_tokens;
  // Chunks that `count` tokens take in pieces of `length`, with what is left over at chunk ends.
  const auto chunks = [&](uint32_t length, uint64_t count) {
    const uint64_t extent = ExtentBytes(shape, length);
    const auto per_chunk = static_cast<double>(std::max<uint64_t>(1, chunk_bytes / extent));
    const uint64_t pieces = (count + length - 1) / length * shape.problems();
    return static_cast<double>(pieces) / per_chunk;
  };
  // Pieces are made whole, however few of their tokens come.
  const uint32_t longest = max_tokens - method.sink_tokens;
  const uint32_t prompt_piece = std::min(method.prompt_segment_tokens, longest);
  const uint32_t decode_piece = std::min(method.decode_segment_tokens, longest);
  // Either kind may fill the sequence; the window's tokens lie twice for a moment; and what the
  // prompt's last piece leaves behind when it is cut may be too short for a decode piece.
  return std::max(chunks(prompt_piece, rest), chunks(decode_piece, rest)) +
         chunks(decode_piece, std::min(rest, method.min_window_tokens + 2 * decode_piece));
}

Piece PieceTable::Geometry(const Layer& layer, uint32_t index) const {
  Piece piece;
  if (layer.decode_begin && index >= layer.prompt_pieces) {
    piece.begin =
        *layer.decode_begin + (index - layer.prompt_pieces) * method_.decode_segment_tokens;
    piece.capacity = std::min(method_.decode_segment_tokens, max_tokens_ - piece.begin);
  } else {
    piece.begin = method_.sink_tokens + index * method_.prompt_segment_tokens;
    piece.capacity = std::min(method_.prompt_segment_tokens, max_tokens_ - piece.begin);
  }
  piece.rows_offset = RowsOffset(piece.capacity);
  return piece;
}

absl::StatusOr<Piece> PieceTable::Allocate(Piece geometry) {
  for (uint32_t head = 0; head < shape_.kv_heads; ++head) {
    auto extent = memory_.Allocate(ExtentBytes(shape_, geometry.capacity));
    if (!extent.ok()) {
      Free(geometry);
      return extent.status();
    }
    geometry.heads.push_back(*extent);
    bytes_ += extent->bytes;
  }
  return geometry;
}

void PieceTable::Free(const Piece& piece) {
  for (const Extent& extent : piece.heads) {
    bytes_ -= extent.bytes;
    memory_.Free(extent);
  }
}

absl::StatusOr<PieceTable::Admission> PieceTable::Plan(uint32_t layer_begin, uint32_t layer_count,
                                                       uint32_t end, bool prompt_end) {
  Admission admission;
  admission.added.resize(layer_count);
  admission.decode.resize(layer_count);
  if (prompt_end) admission.decode_begin = DecodeBegin(method_, end);
  for (uint32_t i = 0; i < layer_count; ++i) {
    absl::Status planned = PlanLayer(layer_begin + i, end, prompt_end, admission.added[i],
                                     admission.decode[i], admission.moves);
    if (!planned.ok()) {
      Discard(admission);
      return planned;
    }
  }
  return admission;
}

void PieceTable::Discard(const Admission& admission) {
  for (const auto* layers : {&admission.added, &admission.decode}) {
    for (const std::vector<Piece>& pieces : *layers) {
      for (const Piece& piece : pieces) Free(piece);
    }
  }
}

absl::Status PieceTable::PlanLayer(uint32_t layer_index, uint32_t end, bool prompt_end,
                                   std::vector<Piece>& added, std::vector<Piece>& decode,
                                   std::vector<RowCopy>& moves) {
  const Layer& layer = layers_[layer_index];
  for (auto index = static_cast<uint32_t>(layer.pieces.size()); Geometry(layer, index).begin < end;
       ++index) {
    CKV_ASSIGN_OR_RETURN(Piece piece, Allocate(Geometry(layer, index)));
    added.push_back(std::move(piece));
  }
  if (!prompt_end) return absl::OkStatus();

  Layer ended;  // the geometry as it will be
  ended.decode_begin = DecodeBegin(method_, end);
  ended.prompt_pieces =
      (*ended.decode_begin - method_.sink_tokens + method_.prompt_segment_tokens - 1) /
      method_.prompt_segment_tokens;
  std::vector<Piece> sources = layer.pieces;
  sources.insert(sources.end(), added.begin(), added.end());
  for (uint32_t index = ended.prompt_pieces; Geometry(ended, index).begin < end; ++index) {
    CKV_ASSIGN_OR_RETURN(Piece piece, Allocate(Geometry(ended, index)));
    decode.push_back(std::move(piece));
    const Piece& target = decode.back();
    for (uint32_t head = 0; head < shape_.kv_heads; ++head) {
      std::vector<RowSpan> spans;
      AppendSpans(sources, head, target.begin, std::min(end, target.begin + target.capacity),
                  spans);
      for (const RowSpan& span : spans) {
        moves.push_back({.source = span.data,
                         .destination = rows(target, head) +
                                        (span.position - target.begin) * shape_.row_bytes(),
                         .bytes = span.tokens * shape_.row_bytes()});
      }
    }
  }
  return absl::OkStatus();
}

// The piece of the position, or the next one.
std::vector<Piece>::const_iterator PieceTable::PieceOf(const std::vector<Piece>& pieces,
                                                       uint32_t position) {
  return std::ranges::upper_bound(pieces, position, {},
                                  [](const Piece& piece) { return piece.begin + piece.capacity; });
}

void PieceTable::AppendSpans(const std::vector<Piece>& pieces, uint32_t head, uint32_t begin,
                             uint32_t end, std::vector<RowSpan>& spans) const {
  for (auto piece = PieceOf(pieces, begin); piece != pieces.end() && piece->begin < end; ++piece) {
    const uint32_t from = std::max(begin, piece->begin);
    const uint32_t to = std::min(end, piece->begin + piece->capacity);
    spans.push_back({.data = rows(*piece, head) + (from - piece->begin) * shape_.row_bytes(),
                     .position = from,
                     .tokens = to - from});
  }
}

void PieceTable::AppendPlaces(uint32_t layer, uint32_t position,
                              std::vector<std::byte*>& places) const {
  const Piece& piece = *PieceOf(layers_[layer].pieces, position);
  for (uint32_t head = 0; head < shape_.kv_heads; ++head) {
    places.push_back(rows(piece, head) + (position - piece.begin) * shape_.row_bytes());
  }
}

void PieceTable::Commit(Admission admission, uint32_t layer_begin, uint32_t begin, uint32_t end,
                        std::vector<std::vector<RowSpan>>& spans) {
  for (size_t i = 0; i < admission.added.size(); ++i) {
    Layer& layer = layers_[layer_begin + i];
    for (Piece& piece : admission.added[i]) layer.pieces.push_back(std::move(piece));
    for (uint32_t head = 0; head < shape_.kv_heads; ++head) {
      AppendSpans(layer.pieces, head, begin, end, spans.emplace_back());
    }
    if (!admission.decode_begin) continue;
    layer.decode_begin = admission.decode_begin;
    while (!layer.pieces.empty() && layer.pieces.back().begin >= *layer.decode_begin) {
      layer.retired.push_back(std::move(layer.pieces.back()));
      layer.pieces.pop_back();
    }
    layer.prompt_pieces = static_cast<uint32_t>(layer.pieces.size());
    if (layer.prompt_pieces > 0) {
      Piece& last = layer.pieces.back();
      last.capacity = *layer.decode_begin - last.begin;  // the memory behind it is still a source
    }
    for (Piece& piece : admission.decode[i]) layer.pieces.push_back(std::move(piece));
  }
}

void PieceTable::FinishPromptEnd(uint32_t layer_index) {
  Layer& layer = layers_[layer_index];
  for (const Piece& piece : layer.retired) Free(piece);
  layer.retired.clear();
  if (layer.prompt_pieces == 0) return;
  Piece& last = layer.pieces[layer.prompt_pieces - 1];
  for (Extent& extent : last.heads) {
    bytes_ -= extent.bytes;
    memory_.Shrink(extent, last.rows_offset + last.capacity * shape_.row_bytes());
    bytes_ += extent.bytes;
  }
}

void PieceTable::FreeAll() {
  for (Layer& layer : layers_) {
    for (const Piece& piece : layer.pieces) Free(piece);
    for (const Piece& piece : layer.retired) Free(piece);
    layer.pieces.clear();
    layer.retired.clear();
  }
}

}  // namespace clusterkv::service
