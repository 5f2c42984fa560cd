#include "client/replay/trace.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstring>
#include <optional>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "client/replay/safetensors.h"
#include "gpu/status_macros.h"
#include "gpu/unique_fd.h"

namespace clusterkv::client::replay {
namespace {

constexpr char kFormat[] = "clusterkv-trace/1";
constexpr uint32_t kMaxTokens = 16'777'216;  // of a sequence
constexpr uint32_t kMaxLayerIndex = 1'000'000;

std::optional<gpu::DType> StorageOf(const std::string& dtype) {
  if (dtype == "F32") return gpu::DType::kFp32;
  if (dtype == "F16") return gpu::DType::kFp16;
  if (dtype == "BF16") return gpu::DType::kBf16;
  return std::nullopt;
}

// Digits only: neither sign nor space.
std::optional<uint32_t> ParseCount(const std::string& text) {
  uint32_t value = 0;
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (text.empty() || error != std::errc() || stop != end) return std::nullopt;
  return value;
}

std::string ShapeText(const Tensor& tensor) {
  return absl::StrCat("[", absl::StrJoin(tensor.shape, ", "), "]");
}

// Index of the first infinity or NaN: an element whose exponent bits are all set.
template <typename Word>
std::optional<size_t> FirstNonFinite(const Tensor& tensor, Word exponent) {
  const size_t count = tensor.bytes / sizeof(Word);
  for (size_t i = 0; i < count; ++i) {
    Word word;
    std::memcpy(&word, tensor.data + i * sizeof(Word), sizeof(Word));
    if ((word & exponent) == exponent) return i;
  }
  return std::nullopt;
}

std::optional<size_t> FirstNonFinite(gpu::DType dtype, const Tensor& tensor) {
  switch (dtype) {
    case gpu::DType::kFp32:
      return FirstNonFinite<uint32_t>(tensor, 0x7f800000u);
    case gpu::DType::kFp16:
      return FirstNonFinite<uint16_t>(tensor, 0x7c00);
    case gpu::DType::kBf16:
      return FirstNonFinite<uint16_t>(tensor, 0x7f80);
  }
  return std::nullopt;
}

absl::StatusOr<gpu::Mapping> MapFile(const std::string& path) {
  gpu::UniqueFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  struct stat file = {};
  if (!fd.valid() || fstat(fd.get(), &file) != 0) return absl::ErrnoToStatus(errno, "open");
  if (!S_ISREG(file.st_mode)) return absl::InvalidArgumentError("not a regular file");
  if (file.st_size == 0) return absl::InvalidArgumentError("the file is empty");
  return gpu::Mapping::Create(fd.get(), static_cast<size_t>(file.st_size),
                              gpu::MapAccess::kReadOnly);
}

}  // namespace

// Fills a Trace from a parsed container, one check after the other.
class TraceReader {
 public:
  TraceReader(const Safetensors& container, Trace& trace) : container_(container), trace_(trace) {}

  absl::Status Read() {
    CKV_RETURN_IF_ERROR(ReadMetadata());
    for (TraceLayer& layer : trace_.layers_) CKV_RETURN_IF_ERROR(ReadLayer(layer));
    CKV_RETURN_IF_ERROR(CheckTokenIds());
    trace_.shape_.layers = static_cast<uint32_t>(trace_.layers_.size());
    return trace_.shape_.Validate();
  }

 private:
  absl::StatusOr<std::string> Metadata(const std::string& key) const {
    const auto found = container_.metadata.find(key);
    if (found != container_.metadata.end()) return found->second;
    return absl::InvalidArgumentError(absl::StrCat("__metadata__ has no \"", key, "\""));
  }

  absl::StatusOr<uint32_t> Count(const std::string& key) const {
    CKV_ASSIGN_OR_RETURN(const std::string text, Metadata(key));
    const std::optional<uint32_t> count = ParseCount(text);
    if (count && *count >= 1 && *count <= kMaxTokens) return *count;
    return absl::InvalidArgumentError(
        absl::StrCat("__metadata__: ", key, " is \"", text, "\"; allowed: 1 to ", kMaxTokens));
  }

  absl::Status ReadMetadata() {
    CKV_ASSIGN_OR_RETURN(const std::string format, Metadata("format"));
    if (format != kFormat) {
      return absl::InvalidArgumentError(
          absl::StrCat("__metadata__: format is \"", format, "\", not \"", kFormat, "\""));
    }
    CKV_ASSIGN_OR_RETURN(trace_.model_, Metadata("model"));
    CKV_ASSIGN_OR_RETURN(trace_.prompt_tokens_, Count("prompt_tokens"));
    CKV_ASSIGN_OR_RETURN(trace_.steps_, Count("decode_tokens"));
    if (trace_.tokens() > kMaxTokens) {
      return absl::InvalidArgumentError(
          absl::StrCat("has ", trace_.tokens(), " tokens; allowed: up to ", kMaxTokens));
    }
    CKV_ASSIGN_OR_RETURN(const std::string scale, Metadata("softmax_scale"));
    if (!absl::SimpleAtof(scale, &trace_.softmax_scale_) || !std::isfinite(trace_.softmax_scale_) ||
        trace_.softmax_scale_ <= 0.0f) {
      return absl::InvalidArgumentError(
          absl::StrCat("__metadata__: softmax_scale is \"", scale, "\"; allowed: above 0"));
    }
    return ReadLayerList();
  }

  absl::Status ReadLayerList() {
    CKV_ASSIGN_OR_RETURN(const std::string list, Metadata("layers"));
    for (const std::string& part : std::vector<std::string>(absl::StrSplit(list, ','))) {
      const std::optional<uint32_t> index = ParseCount(part);
      if (!index || *index > kMaxLayerIndex) {
        return absl::InvalidArgumentError(
            absl::StrCat("__metadata__: layers is \"", list, "\"; expected e.g. \"12,25\""));
      }
      trace_.layers_.push_back({.index = *index});
    }
    const auto by_index = [](const TraceLayer& a, const TraceLayer& b) {
      return a.index < b.index;
    };
    std::sort(trace_.layers_.begin(), trace_.layers_.end(), by_index);
    for (size_t i = 1; i < trace_.layers_.size(); ++i) {
      if (trace_.layers_[i].index == trace_.layers_[i - 1].index) {
        return absl::InvalidArgumentError(absl::StrCat("__metadata__: layers is \"", list, "\": ",
                                                       trace_.layers_[i].index, " is there twice"));
      }
    }
    return absl::OkStatus();
  }

  // [first_extent][heads][head_dim] of the trace's one dtype; the first tensor sets the dtype.
  absl::StatusOr<const Tensor*> Values(const std::string& name, uint64_t first_extent) {
    const auto found = container_.tensors.find(name);
    if (found == container_.tensors.end()) {
      return absl::InvalidArgumentError(absl::StrCat("has no tensor ", name));
    }
    const Tensor& tensor = found->second;
    const std::optional<gpu::DType> dtype = StorageOf(tensor.dtype);
    if (!dtype) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, " is ", tensor.dtype, "; allowed: F32, F16, BF16"));
    }
    if (!dtype_known_) trace_.shape_.dtype = *dtype;
    dtype_known_ = true;
    if (*dtype != trace_.shape_.dtype) {
      return absl::InvalidArgumentError(absl::StrCat(name, " is ", tensor.dtype,
                                                     "; the tensors before it are ",
                                                     gpu::DTypeName(trace_.shape_.dtype)));
    }
    if (tensor.shape.size() != 3 || tensor.shape[0] != first_extent ||
        tensor.shape[1] > UINT32_MAX || tensor.shape[2] > UINT32_MAX) {
      return absl::InvalidArgumentError(absl::StrCat(
          name, " is ", ShapeText(tensor), "; expected [", first_extent, ", heads, head_dim]"));
    }
    if (const std::optional<size_t> bad = FirstNonFinite(*dtype, tensor)) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ": element ", *bad, " is infinite or not a number"));
    }
    return &tensor;
  }

  absl::Status ReadLayer(TraceLayer& layer) {
    const std::string prefix = absl::StrCat("layers.", layer.index, ".");
    const bool is_first = &layer == trace_.layers_.data();
    gpu::Shape& shape = trace_.shape_;
    CKV_ASSIGN_OR_RETURN(const Tensor* k, Values(prefix + "k", trace_.tokens()));
    CKV_ASSIGN_OR_RETURN(const Tensor* v, Values(prefix + "v", trace_.tokens()));
    CKV_ASSIGN_OR_RETURN(const Tensor* q, Values(prefix + "q", trace_.steps()));
    if (is_first) {
      shape.layers = 1;
      shape.kv_heads = static_cast<uint32_t>(k->shape[1]);
      shape.q_heads = static_cast<uint32_t>(q->shape[1]);
      shape.head_dim = static_cast<uint32_t>(k->shape[2]);
      CKV_RETURN_IF_ERROR(shape.Validate());
    }
    const auto check = [&](const char* part, const Tensor& tensor, uint32_t heads) -> absl::Status {
      if (tensor.shape[1] == heads && tensor.shape[2] == shape.head_dim) return absl::OkStatus();
      return absl::InvalidArgumentError(absl::StrCat(prefix, part, " is ", ShapeText(tensor),
                                                     "; expected ", heads, " heads of ",
                                                     shape.head_dim));
    };
    CKV_RETURN_IF_ERROR(check("k", *k, shape.kv_heads));
    CKV_RETURN_IF_ERROR(check("v", *v, shape.kv_heads));
    CKV_RETURN_IF_ERROR(check("q", *q, shape.q_heads));
    layer.k = k->data;
    layer.v = v->data;
    layer.q = q->data;
    return absl::OkStatus();
  }

  absl::Status CheckTokenIds() const {
    const auto found = container_.tensors.find("token_ids");
    if (found == container_.tensors.end()) return absl::OkStatus();
    const Tensor& ids = found->second;
    if (ids.dtype == "I32" && ids.shape == std::vector<uint64_t>{trace_.tokens()}) {
      return absl::OkStatus();
    }
    return absl::InvalidArgumentError(absl::StrCat("token_ids is ", ids.dtype, " ", ShapeText(ids),
                                                   "; expected I32 [", trace_.tokens(), "]"));
  }

  const Safetensors& container_;
  Trace& trace_;
  bool dtype_known_ = false;
};

absl::StatusOr<Trace> Trace::Open(const std::string& path) {
  const auto in_file = [&](const absl::Status& status) {
    return absl::Status(status.code(), absl::StrCat(path, ": ", status.message()));
  };
  Trace trace;
  trace.path_ = path;
  absl::StatusOr<gpu::Mapping> mapping = MapFile(path);
  if (!mapping.ok()) return in_file(mapping.status());
  trace.mapping_ = *std::move(mapping);
  const absl::StatusOr<Safetensors> container =
      ParseSafetensors(absl::MakeConstSpan(trace.mapping_.data(), trace.mapping_.bytes()));
  if (!container.ok()) return in_file(container.status());
  if (const absl::Status status = TraceReader(*container, trace).Read(); !status.ok()) {
    return in_file(status);
  }
  return trace;
}

}  // namespace clusterkv::client::replay
