#include "client/ctl/report.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "client/ctl/status_json.h"
#include "client/ctl/terminal_text.h"

namespace clusterkv::client::ctl {
namespace {

using Json = nlohmann::ordered_json;

std::string Bytes(uint64_t bytes) { return BytesText(static_cast<double>(bytes)); }

std::string Dump(const Json& json) {
  // A name that is not UTF-8 must not end the program.
  return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

const char* DTypeText(v1::DType dtype) {
  switch (dtype) {
    case v1::DTYPE_BF16:
      return "bf16";
    case v1::DTYPE_FP16:
      return "fp16";
    case v1::DTYPE_FP32:
      return "fp32";
    default:
      return "unknown";
  }
}

const char* ModeText(v1::FetchMode mode) {
  switch (mode) {
    case v1::FETCH_MODE_DIRECT:
      return "direct";
    case v1::FETCH_MODE_SERVED:
      return "served";
    default:
      return "unknown";
  }
}

Json SessionList(const v1::GetStatusReply& status) {
  Json sessions = Json::array();
  for (const v1::SessionInfo& session : status.session_list()) {
    sessions.push_back(SessionInfoJson(session));
  }
  return sessions;
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

}  // namespace

std::string PingJson(const PingTimes& times) {
  const auto [least, most] =
      std::minmax_element(times.microseconds.begin(), times.microseconds.end());
  return Dump(Json{{"address", times.address},
                   {"round_trips", times.microseconds.size()},
                   {"median_us", Median(times.microseconds)},
                   {"min_us", *least},
                   {"max_us", *most}});
}

std::string PingTable(const PingTimes& times) {
  const auto [least, most] =
      std::minmax_element(times.microseconds.begin(), times.microseconds.end());
  return fmt::format("{}: {} round trips, median {:.1f} us, min {:.1f} us, max {:.1f} us\n",
                     times.address, times.microseconds.size(), Median(times.microseconds), *least,
                     *most);
}

std::string StatusJson(const v1::GetStatusReply& status) {
  return Dump(Json{{"version", status.version()},
                   {"backend", status.backend()},
                   {"device", status.device()},
                   {"boot_epoch", status.boot_epoch()},
                   {"ready", status.ready()},
                   {"not_ready_reason", status.not_ready_reason()},
                   {"uptime_seconds", status.uptime_seconds()},
                   {"sessions", status.sessions()},
                   {"sequences", status.sequences()},
                   {"host_bytes", HostBytesJson(status.host_bytes())},
                   {"gpu_bytes", {{"used", status.gpu_bytes_used()}}},
                   {"session_list", SessionList(status)},
                   {"grant_list", GrantListJson(status)},
                   {"device_age_seconds", status.device_age_seconds()},
                   {"counters", CountersJson(status)},
                   {"recent_errors", RecentErrorsJson(status)}});
}

std::string StatusTable(const v1::GetStatusReply& status) {
  const v1::HostBytes& host = status.host_bytes();
  uint64_t errors = 0;
  for (const v1::RecentError& error : status.recent_errors()) errors += error.count();
  const std::string ready = status.ready() ? "yes" : "no: " + status.not_ready_reason();
  return Table({{"version", status.version()},
                {"backend", status.backend()},
                {"device", status.device()},
                {"boot epoch", fmt::format("{:016x}", status.boot_epoch())},
                {"ready", ready},
                {"uptime", fmt::format("{:.0f} s", status.uptime_seconds())},
                {"sessions", std::to_string(status.sessions())},
                {"sequences", std::to_string(status.sequences())},
                {"host total", Bytes(host.total())},
                {"host used", Bytes(host.used())},
                {"host reserved", Bytes(host.reserved())},
                {"host quarantined", Bytes(host.quarantined())},
                {"device used", Bytes(status.gpu_bytes_used())},
                {"warnings and errors",
                 errors == 0 ? "none since the start"
                             : fmt::format("{}, the last: {}", errors,
                                           status.recent_errors().rbegin()->text())}});
}

std::string SessionsJson(const v1::GetStatusReply& status) {
  return Dump(Json{{"boot_epoch", status.boot_epoch()}, {"sessions", SessionList(status)}});
}

std::string SessionsTable(const v1::GetStatusReply& status) {
  std::vector<std::vector<std::string>> rows = {
      {"SESSION", "NAME", "PID", "UID", "ATTACHED", "SEQUENCES", "HOST", "DEVICE", "AGE"}};
  for (const v1::SessionInfo& session : status.session_list()) {
    rows.push_back({std::to_string(session.session_id()), session.client_name(),
                    std::to_string(session.pid()), std::to_string(session.uid()),
                    session.attached() ? "yes" : "no", std::to_string(session.sequences()),
                    Bytes(session.host_bytes()), Bytes(session.gpu_bytes()),
                    fmt::format("{:.0f} s", session.age_seconds())});
  }
  return Table(rows);
}

std::string SequencesJson(const v1::ListSequencesReply& list) {
  Json sequences = Json::array();
  for (const v1::SequenceInfo& sequence : list.sequences()) {
    const v1::Shape& shape = sequence.shape();
    sequences.push_back({{"sequence_id", sequence.sequence_id()},
                         {"session_id", sequence.session_id()},
                         {"mode", ModeText(sequence.mode())},
                         {"shape",
                          {{"layers", shape.layers()},
                           {"kv_heads", shape.kv_heads()},
                           {"q_heads", shape.q_heads()},
                           {"head_dim", shape.head_dim()},
                           {"dtype", DTypeText(shape.dtype())}}},
                         {"max_tokens", sequence.max_tokens()},
                         {"ingested_tokens", sequence.ingested_tokens()},
                         {"prompt_tokens", sequence.prompt_tokens()},
                         {"published_segments", sequence.published_segments()},
                         {"cut", sequence.cut()},
                         {"host_bytes", sequence.host_bytes()},
                         {"state_bytes", sequence.state_bytes()},
                         {"failure", sequence.failure()}});
  }
  return Dump(Json{{"boot_epoch", list.boot_epoch()}, {"sequences", std::move(sequences)}});
}

std::string SequencesTable(const v1::ListSequencesReply& list) {
  std::vector<std::vector<std::string>> rows = {{"SEQUENCE", "SESSION", "MODE", "SHAPE", "INGESTED",
                                                 "MAX", "SEGMENTS", "CUT", "HOST", "STATE",
                                                 "FAILURE"}};
  for (const v1::SequenceInfo& sequence : list.sequences()) {
    const v1::Shape& shape = sequence.shape();
    rows.push_back(
        {std::to_string(sequence.sequence_id()), std::to_string(sequence.session_id()),
         ModeText(sequence.mode()),
         fmt::format("{}x{}/{}x{} {}", shape.layers(), shape.kv_heads(), shape.q_heads(),
                     shape.head_dim(), DTypeText(shape.dtype())),
         std::to_string(sequence.ingested_tokens()), std::to_string(sequence.max_tokens()),
         std::to_string(sequence.published_segments()), std::to_string(sequence.cut()),
         Bytes(sequence.host_bytes()), Bytes(sequence.state_bytes()), sequence.failure()});
  }
  return Table(rows);
}

}  // namespace clusterkv::client::ctl
