// How arguments cross the C interface. Structs go by their first member, the size that the caller
// knows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/c/clusterkv.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::c {

// Bytes of a struct in the first version that had it, which stay when members are appended, and
// now; and what messages call it. No struct ends in padding, where an appended member would not
// show.
template <typename Struct>
struct StructInfo;

#define CKV_C_STRUCT(type, first_bytes, bytes)         \
  static_assert(sizeof(type) == (bytes));              \
  static_assert((bytes) % 8 == 0);                     \
  template <>                                          \
  struct StructInfo<type> {                            \
    static constexpr size_t kFirstBytes = first_bytes; \
    static constexpr const char* kName = #type;        \
  }

CKV_C_STRUCT(clusterkv_client_options, 48, 56);
CKV_C_STRUCT(clusterkv_client_info, 40, 40);
CKV_C_STRUCT(clusterkv_method_options, 80, 80);
CKV_C_STRUCT(clusterkv_sequence_options, 48, 48);
CKV_C_STRUCT(clusterkv_range, 32, 32);
CKV_C_STRUCT(clusterkv_kv, 56, 56);
CKV_C_STRUCT(clusterkv_counters, 48, 48);
CKV_C_STRUCT(clusterkv_batch_options, 24, 24);
CKV_C_STRUCT(clusterkv_attention, 72, 72);

#undef CKV_C_STRUCT

// Errors: INVALID_ARGUMENT.
absl::Status CheckNotNull(const void* pointer, const char* name);
absl::Status CheckStructSize(const char* name, size_t given, size_t least, size_t most);
absl::Status CheckSwitch(const char* name, uint32_t value);
absl::Status CheckReserved(uint32_t value);
// At least 0, and a number.
absl::StatusOr<absl::Duration> ReadTimeout(const char* name, double seconds);

template <typename Struct>
absl::Status CheckStruct(const Struct* given) {
  using Info = StructInfo<Struct>;
  CKV_RETURN_IF_ERROR(CheckNotNull(given, Info::kName));
  return CheckStructSize(Info::kName, given->struct_size, Info::kFirstBytes, sizeof(Struct));
}

// What the caller gave; members that it does not know are as in `defaults`.
template <typename Struct>
absl::StatusOr<Struct> ReadStruct(const Struct* given, const Struct& defaults) {
  CKV_RETURN_IF_ERROR(CheckStruct(given));
  Struct read = defaults;
  std::memcpy(&read, given, given->struct_size);
  return read;
}

// Fills in the members that the caller knows. REQUIRES: CheckStruct(to).
template <typename Struct>
void WriteStruct(const Struct& from, Struct* to) {
  const size_t bytes = to->struct_size;
  std::memcpy(to, &from, bytes);
  to->struct_size = bytes;
}

}  // namespace clusterkv::client::c
