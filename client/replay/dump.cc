#include "client/replay/dump.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "client/replay/safetensors.h"

namespace clusterkv::client::replay {
namespace {

template <typename T>
absl::Span<const std::byte> BytesOf(const std::vector<T>& values) {
  return absl::MakeConstSpan(reinterpret_cast<const std::byte*>(values.data()),
                             values.size() * sizeof(T));
}

}  // namespace

OutputDump::OutputDump(const Trace& trace, uint32_t steps, uint32_t budget)
    : trace_(trace), steps_(steps), budget_(budget) {
  const gpu::Shape& shape = trace.shape();
  outputs_.assign(shape.layers, std::vector<float>(size_t{steps} * shape.q_heads * shape.head_dim));
  selected_.assign(shape.layers, std::vector<int32_t>(size_t{steps} * shape.kv_heads * budget, -1));
}

void OutputDump::Set(size_t layer, uint32_t step, absl::Span<const float> outputs,
                     absl::Span<const int32_t> selected) {
  std::copy(outputs.begin(), outputs.end(), outputs_[layer].data() + step * outputs.size());
  std::copy(selected.begin(), selected.end(), selected_[layer].data() + step * selected.size());
}

absl::Status OutputDump::Write(const std::string& path) const {
  const gpu::Shape& shape = trace_.shape();
  std::vector<TensorSource> tensors;
  for (size_t i = 0; i < shape.layers; ++i) {
    const std::string prefix = absl::StrCat("layers.", trace_.layers()[i].index, ".");
    tensors.push_back(
        {prefix + "o", "F32", {steps_, shape.q_heads, shape.head_dim}, BytesOf(outputs_[i])});
    tensors.push_back(
        {prefix + "selected", "I32", {steps_, shape.kv_heads, budget_}, BytesOf(selected_[i])});
  }
  return WriteSafetensors(path, {{"format", "clusterkv-outputs/1"}, {"model", trace_.model()}},
                          tensors);
}

}  // namespace clusterkv::client::replay
