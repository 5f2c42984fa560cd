// The C interface: version, errors, client.
#include "client/client.h"

#include <memory>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/c/arguments.h"
#include "client/c/clusterkv.h"
#include "client/c/handles.h"
#include "client/c/last_error.h"
#include "gpu/device.h"
#include "gpu/status_macros.h"

#define CKV_TEXT_INNER(x) #x
#define CKV_TEXT(x) CKV_TEXT_INNER(x)
static_assert(std::string_view(CLUSTERKV_VERSION) == CLUSTERKV_PROJECT_VERSION);
static_assert(std::string_view(CLUSTERKV_VERSION) ==
              CKV_TEXT(CLUSTERKV_VERSION_MAJOR) "." CKV_TEXT(CLUSTERKV_VERSION_MINOR) "." CKV_TEXT(
                  CLUSTERKV_VERSION_PATCH));

namespace clusterkv::client::c {
namespace {

constexpr uint32_t kMaxDeviceThreads = 1024;

absl::StatusOr<ClientOptions> ReadClientOptions(const clusterkv_client_options* options) {
  const clusterkv_client_options defaults = CLUSTERKV_CLIENT_OPTIONS_INIT;
  CKV_ASSIGN_OR_RETURN(const clusterkv_client_options given,
                       ReadStruct(options != nullptr ? options : &defaults, defaults));
  CKV_RETURN_IF_ERROR(CheckNotNull(given.address, "address"));
  CKV_RETURN_IF_ERROR(CheckNotNull(given.name, "name"));
  CKV_RETURN_IF_ERROR(CheckReserved(given.reserved));
  if (given.device_threads > kMaxDeviceThreads) {
    return absl::InvalidArgumentError(absl::StrCat("device_threads is ", given.device_threads,
                                                   "; allowed: 0 to ", kMaxDeviceThreads));
  }
  CKV_ASSIGN_OR_RETURN(const absl::Duration rpc_timeout,
                       ReadTimeout("rpc_timeout_seconds", given.rpc_timeout_seconds));
  return ClientOptions{.address = given.address,
                       .name = given.name,
                       .ring_bytes = given.ring_bytes,
                       .rpc_timeout = rpc_timeout,
                       .device_threads = static_cast<int>(given.device_threads),
                       .audit_rate = given.audit_rate};
}

absl::Status Connect(const clusterkv_client_options* options, clusterkv_client** client) {
  CKV_RETURN_IF_ERROR(CheckNotNull(client, "the result's place"));
  *client = nullptr;
  CKV_ASSIGN_OR_RETURN(const ClientOptions read, ReadClientOptions(options));
  auto handle = std::make_unique<clusterkv_client>();
  CKV_ASSIGN_OR_RETURN(handle->client, Client::Connect(read));
  *client = handle.release();
  return absl::OkStatus();
}

absl::Status GetInfo(const clusterkv_client* client, clusterkv_client_info* info) {
  CKV_RETURN_IF_ERROR(CheckNotNull(client, "client"));
  CKV_RETURN_IF_ERROR(CheckStruct(info));
  const gpu::Device& device = client->client->device();
  WriteStruct({.struct_size = 0,
               .session_id = client->client->session_id(),
               .backend = device.backend().c_str(),
               .device_uuid = device.uuid().c_str(),
               .device_description = device.description().c_str()},
              info);
  return absl::OkStatus();
}

}  // namespace
}  // namespace clusterkv::client::c

using namespace clusterkv::client::c;  // NOLINT(google-build-using-namespace): C has none

extern "C" {

const char* clusterkv_version(void) { return CLUSTERKV_VERSION; }

const char* clusterkv_last_error(void) { return LastError(); }

const char* clusterkv_status_name(clusterkv_status status) {
  constexpr const char* kNames[] = {"OK",
                                    "CANCELLED",
                                    "UNKNOWN",
                                    "INVALID_ARGUMENT",
                                    "DEADLINE_EXCEEDED",
                                    "NOT_FOUND",
                                    "ALREADY_EXISTS",
                                    "PERMISSION_DENIED",
                                    "RESOURCE_EXHAUSTED",
                                    "FAILED_PRECONDITION",
                                    "ABORTED",
                                    "OUT_OF_RANGE",
                                    "UNIMPLEMENTED",
                                    "INTERNAL",
                                    "UNAVAILABLE",
                                    "DATA_LOSS",
                                    "UNAUTHENTICATED"};
  const auto code = static_cast<size_t>(status);
  return code < std::size(kNames) ? kNames[code] : kNames[CLUSTERKV_UNKNOWN];
}

clusterkv_status clusterkv_client_connect(const clusterkv_client_options* options,
                                          clusterkv_client** client) {
  return Guarded([&] { return Connect(options, client); });
}

clusterkv_status clusterkv_client_get_info(const clusterkv_client* client,
                                           clusterkv_client_info* info) {
  return Guarded([&] { return GetInfo(client, info); });
}

clusterkv_status clusterkv_client_health(const clusterkv_client* client) {
  return Guarded([&] {
    CKV_RETURN_IF_ERROR(CheckNotNull(client, "client"));
    return client->client->health();
  });
}

void clusterkv_client_close(clusterkv_client* client) { delete client; }

}  // extern "C"
