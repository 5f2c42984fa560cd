#include "client/replay/safetensors.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>
#include <optional>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gpu/status_macros.h"
#include "nlohmann/json.hpp"

namespace clusterkv::client::replay {
namespace {

using Json = nlohmann::json;

constexpr uint64_t kLengthBytes = 8;
// What the format's own library refuses, too.
constexpr uint64_t kMaxHeaderBytes = 100'000'000;

// Bytes per element; nullopt for a dtype that the format does not have.
std::optional<uint64_t> ElementBytes(const std::string& dtype) {
  static const auto* const sizes = new std::map<std::string, uint64_t>{
      {"F64", 8}, {"F32", 4}, {"F16", 2},  {"BF16", 2},    {"I64", 8},
      {"I32", 4}, {"I16", 2}, {"I8", 1},   {"U64", 8},     {"U32", 4},
      {"U16", 2}, {"U8", 1},  {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};
  const auto found = sizes->find(dtype);
  if (found == sizes->end()) return std::nullopt;
  return found->second;
}

absl::StatusOr<Json> ParseHeader(const std::byte* begin, uint64_t bytes) {
  // nlohmann keeps the last of two equal keys without a word; here that would hide a tensor.
  std::set<std::string> names;
  std::string twice;
  const auto callback = [&](int depth, Json::parse_event_t event, Json& parsed) {
    if (event == Json::parse_event_t::key && depth == 1) {
      const auto name = parsed.get<std::string>();
      if (!names.insert(name).second) twice = name;
    }
    return true;
  };
  const char* const text = reinterpret_cast<const char*>(begin);
  Json header = Json::parse(text, text + bytes, callback, /*allow_exceptions=*/false);
  if (header.is_discarded()) return absl::InvalidArgumentError("the header is not JSON");
  if (!header.is_object()) return absl::InvalidArgumentError("the header is not a JSON object");
  if (!twice.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("\"", twice, "\" is twice in the header"));
  }
  return header;
}

absl::Status ParseMetadata(const Json& entry, std::map<std::string, std::string>& metadata) {
  if (!entry.is_object()) return absl::InvalidArgumentError("__metadata__ is not an object");
  for (const auto& [key, value] : entry.items()) {
    if (!value.is_string()) {
      return absl::InvalidArgumentError(
          absl::StrCat("__metadata__: \"", key, "\" is not a string"));
    }
    metadata[key] = value.get<std::string>();
  }
  return absl::OkStatus();
}

bool IsListOfUnsigned(const Json& entry) {
  return entry.is_array() && std::all_of(entry.begin(), entry.end(), [](const Json& item) {
           return item.is_number_unsigned();
         });
}

absl::StatusOr<uint64_t> BytesOf(const Tensor& tensor) {
  const std::optional<uint64_t> element = ElementBytes(tensor.dtype);
  if (!element) return absl::InvalidArgumentError(absl::StrCat("unknown dtype ", tensor.dtype));
  uint64_t bytes = *element;
  for (const uint64_t extent : tensor.shape) {
    if (__builtin_mul_overflow(bytes, extent, &bytes)) {
      return absl::InvalidArgumentError("its shape has more than 2^64 bytes");
    }
  }
  return bytes;
}

struct Placed {
  Tensor tensor;
  uint64_t begin = 0;
  uint64_t end = 0;
};

absl::StatusOr<Placed> ParseTensor(const Json& entry, absl::Span<const std::byte> data) {
  if (!entry.is_object() || !entry.contains("dtype") || !entry.contains("shape") ||
      !entry.contains("data_offsets")) {
    return absl::InvalidArgumentError("not an object with dtype, shape and data_offsets");
  }
  const Json& offsets = entry["data_offsets"];
  if (!entry["dtype"].is_string()) return absl::InvalidArgumentError("dtype is not a string");
  if (!IsListOfUnsigned(entry["shape"])) {
    return absl::InvalidArgumentError("shape is not a list of sizes");
  }
  if (!IsListOfUnsigned(offsets) || offsets.size() != 2) {
    return absl::InvalidArgumentError("data_offsets is not a pair of offsets");
  }
  Placed placed;
  placed.tensor.dtype = entry["dtype"].get<std::string>();
  placed.tensor.shape = entry["shape"].get<std::vector<uint64_t>>();
  placed.begin = offsets[0].get<uint64_t>();
  placed.end = offsets[1].get<uint64_t>();
  if (placed.begin > placed.end || placed.end > data.size()) {
    return absl::InvalidArgumentError(absl::StrCat("data_offsets [", placed.begin, ", ", placed.end,
                                                   "] do not lie within the ", data.size(),
                                                   " bytes of data"));
  }
  CKV_ASSIGN_OR_RETURN(const uint64_t bytes, BytesOf(placed.tensor));
  if (bytes != placed.end - placed.begin) {
    return absl::InvalidArgumentError(
        absl::StrCat("its shape has ", bytes, " bytes, its offsets ", placed.end - placed.begin));
  }
  placed.tensor.data = data.data() + placed.begin;
  placed.tensor.bytes = bytes;
  return placed;
}

absl::Status CheckCover(std::vector<std::pair<uint64_t, uint64_t>> ranges, uint64_t data_bytes) {
  std::sort(ranges.begin(), ranges.end());
  uint64_t end = 0;
  for (const auto& [range_begin, range_end] : ranges) {
    if (range_begin != end) {
      return absl::InvalidArgumentError(
          absl::StrCat("the data has a gap or an overlap at offset ", std::min(end, range_begin)));
    }
    end = range_end;
  }
  if (end != data_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("the tensors end at ", end, ", the data at ", data_bytes));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Safetensors> ParseSafetensors(absl::Span<const std::byte> file) {
  if (file.size() < kLengthBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("has ", file.size(), " bytes; too short for a header"));
  }
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, file.data(), kLengthBytes);
  if (header_bytes > std::min<uint64_t>(kMaxHeaderBytes, file.size() - kLengthBytes)) {
    return absl::InvalidArgumentError(absl::StrCat("header length ", header_bytes,
                                                   " is beyond the file of ", file.size(),
                                                   " bytes, or above ", kMaxHeaderBytes));
  }
  CKV_ASSIGN_OR_RETURN(const Json header, ParseHeader(file.data() + kLengthBytes, header_bytes));
  const absl::Span<const std::byte> data = file.subspan(kLengthBytes + header_bytes);
  Safetensors parsed;
  std::vector<std::pair<uint64_t, uint64_t>> ranges;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") {
      CKV_RETURN_IF_ERROR(ParseMetadata(entry, parsed.metadata));
      continue;
    }
    absl::StatusOr<Placed> placed = ParseTensor(entry, data);
    if (!placed.ok()) {
      return absl::InvalidArgumentError(absl::StrCat(name, ": ", placed.status().message()));
    }
    ranges.emplace_back(placed->begin, placed->end);
    parsed.tensors.emplace(name, std::move(placed->tensor));
  }
  CKV_RETURN_IF_ERROR(CheckCover(std::move(ranges), data.size()));
  return parsed;
}

absl::Status WriteSafetensors(const std::string& path,
                              const std::map<std::string, std::string>& metadata,
                              const std::vector<TensorSource>& tensors) {
  Json header = Json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  uint64_t offset = 0;
  for (const TensorSource& tensor : tensors) {
    header[tensor.name] = {{"dtype", tensor.dtype},
                           {"shape", tensor.shape},
                           {"data_offsets", {offset, offset + tensor.data.size()}}};
    offset += tensor.data.size();
  }
  std::string text = header.dump();
  // Data on a multiple of 8 bytes lets readers map it as it is.
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const uint64_t header_bytes = text.size();
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out.write(reinterpret_cast<const char*>(&header_bytes), kLengthBytes);
  out.write(text.data(), static_cast<std::streamsize>(text.size()));
  for (const TensorSource& tensor : tensors) {
    out.write(reinterpret_cast<const char*>(tensor.data.data()),
              static_cast<std::streamsize>(tensor.data.size()));
  }
  out.close();
  if (out.good()) return absl::OkStatus();
  return absl::ErrnoToStatus(errno == 0 ? EIO : errno, absl::StrCat("writing ", path));
}

}  // namespace clusterkv::client::replay
