// The safetensors container: u64 header length (little-endian), a JSON header, the data.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace clusterkv::client::replay {

struct Tensor {
  std::string dtype;  // as in the file: "F32", "F16", "BF16", "I32", ...
  std::vector<uint64_t> shape;
  const std::byte* data = nullptr;  // any alignment
  uint64_t bytes = 0;
};

struct Safetensors {
  std::map<std::string, std::string> metadata;
  std::map<std::string, Tensor> tensors;  // data points into the file
};

// Checks everything: lengths, JSON, dtypes, shapes against sizes, and that the tensors cover the
// data without gap or overlap. Errors: INVALID_ARGUMENT.
absl::StatusOr<Safetensors> ParseSafetensors(absl::Span<const std::byte> file);

// A tensor to write.
struct TensorSource {
  std::string name;
  std::string dtype;
  std::vector<uint64_t> shape;
  absl::Span<const std::byte> data;
};

// Errors: what errno says, with the path.
absl::Status WriteSafetensors(const std::string& path,
                              const std::map<std::string, std::string>& metadata,
                              const std::vector<TensorSource>& tensors);

}  // namespace clusterkv::client::replay
