#include "service/rpc/convert.h"

#include <fmt/format.h>

#include <cstring>
#include <utility>

#include "gpu/status_macros.h"

namespace clusterkv::service {
namespace {

absl::StatusOr<gpu::DType> FromProto(v1::DType dtype) {
  switch (dtype) {
    case v1::DTYPE_BF16:
      return gpu::DType::kBf16;
    case v1::DTYPE_FP16:
      return gpu::DType::kFp16;
    case v1::DTYPE_FP32:
      return gpu::DType::kFp32;
    default:
      return absl::InvalidArgumentError(
          fmt::format("shape.dtype is {}, allowed are BF16, FP16, FP32", static_cast<int>(dtype)));
  }
}

absl::StatusOr<gpu::GroupRule> FromProto(v1::GroupRule rule) {
  switch (rule) {
    case v1::GROUP_RULE_SOFTMAX:
      return gpu::GroupRule::kSoftmax;
    case v1::GROUP_RULE_MEAN:
      return gpu::GroupRule::kMean;
    case v1::GROUP_RULE_MAX:
      return gpu::GroupRule::kMax;
    default:
      return absl::InvalidArgumentError(fmt::format(
          "method.group is {}, allowed are SOFTMAX, MEAN, MAX", static_cast<int>(rule)));
  }
}

absl::StatusOr<TensorPlace> FromProto(const v1::ArenaRange& range, const char* name) {
  if (range.arena_id() == 0) {
    return absl::InvalidArgumentError(fmt::format("{}: arena_id is 0", name));
  }
  return TensorPlace{.inline_bytes = {},
                     .arena = range.arena_id(),
                     .offset = range.offset(),
                     .bytes = range.bytes()};
}

absl::StatusOr<TensorPlace> FromProto(const v1::TensorRef& tensor, const char* name) {
  switch (tensor.place_case()) {
    case v1::TensorRef::kInline:
      return TensorPlace{.inline_bytes = tensor.inline_()};
    case v1::TensorRef::kArena:
      return FromProto(tensor.arena(), name);
    default:
      return absl::InvalidArgumentError(fmt::format("{} is missing", name));
  }
}

void ToProto(const HostPoolStatus& host, v1::HostBytes& bytes) {
  bytes.set_total(host.total_bytes);
  bytes.set_used(host.used_bytes);
  bytes.set_reserved(host.reserved_bytes);
  bytes.set_quarantined(host.quarantined_bytes);
}

void ToProto(const CacheCounters& counters, v1::CacheCounters& message) {
  message.set_hit_clusters(counters.hit_clusters);
  message.set_missed_clusters(counters.missed_clusters);
  message.set_hit_tokens(counters.hit_tokens);
  message.set_missed_tokens(counters.missed_tokens);
  message.set_hit_bytes(counters.hit_bytes);
  message.set_missed_bytes(counters.missed_bytes);
  message.set_gathered_bytes(counters.gathered_bytes);
}

void CountersToProto(const DaemonStatus& status, v1::Counters& message) {
  ToProto(status.direct, *message.mutable_direct());
  ToProto(status.served, *message.mutable_served());
  message.set_ingested_tokens(status.ingested_tokens);
  message.set_clustered_tokens(status.clustered_tokens);
  message.set_published_segments(status.published_segments);
  message.set_cluster_problems(status.clustering.problems);
  message.set_cluster_seconds(status.clustering.seconds);
  message.set_sessions_started(status.sessions_started);
  message.set_sessions_lost(status.sessions_ended_lost);
  message.set_rejected_attaches(status.rejected_attaches);
}

v1::DType ToProto(gpu::DType dtype) {
  switch (dtype) {
    case gpu::DType::kBf16:
      return v1::DTYPE_BF16;
    case gpu::DType::kFp16:
      return v1::DTYPE_FP16;
    case gpu::DType::kFp32:
      return v1::DTYPE_FP32;
  }
  return v1::DTYPE_UNSPECIFIED;
}

std::string FloatBytes(const std::vector<float>& values) {
  std::string bytes(values.size() * sizeof(float), '\0');
  if (!values.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

}  // namespace

SessionKey FromProto(const v1::SessionRef& session) {
  return {.token = session.session_token(), .boot_epoch = session.boot_epoch()};
}

HelloInfo FromProto(const v1::Hello& hello) {
  HelloInfo info{.protocol_version_min = hello.protocol_version_min(),
                 .protocol_version_max = hello.protocol_version_max(),
                 .state_layout_versions = {hello.state_layout_versions().begin(),
                                           hello.state_layout_versions().end()},
                 .client_name = hello.client_name(),
                 .group = std::nullopt};
  if (hello.has_group()) {
    info.group = SessionGroup{.id = hello.group().id(),
                              .rank = hello.group().rank(),
                              .world_size = hello.group().world_size(),
                              .kv_head_offset = hello.group().kv_head_offset()};
  }
  return info;
}

absl::StatusOr<RegisterRequest> FromProto(const v1::RegisterSequenceRequest& request) {
  const v1::Shape& shape = request.shape();
  const v1::Method& method = request.method();
  RegisterRequest converted;
  CKV_ASSIGN_OR_RETURN(const gpu::DType dtype, FromProto(shape.dtype()));
  CKV_ASSIGN_OR_RETURN(const gpu::GroupRule group, FromProto(method.group()));
  converted.shape = {.layers = shape.layers(),
                     .kv_heads = shape.kv_heads(),
                     .q_heads = shape.q_heads(),
                     .head_dim = shape.head_dim(),
                     .dtype = dtype};
  converted.method = {.sink_tokens = method.sink_tokens(),
                      .min_window_tokens = method.min_window_tokens(),
                      .decode_segment_tokens = method.decode_segment_tokens(),
                      .prompt_segment_tokens = method.prompt_segment_tokens(),
                      .tokens_per_cluster = method.tokens_per_cluster(),
                      .kmeans_iterations = method.kmeans_iterations(),
                      .group = group,
                      .center_keys = method.center_keys(),
                      .estimate = method.estimate(),
                      .window_lag_segments = method.window_lag_segments(),
                      .budget_tokens = method.budget_tokens(),
                      .cache_tokens = method.cache_tokens(),
                      .softmax_scale = method.softmax_scale(),
                      .seed = method.seed()};
  converted.max_tokens = request.max_tokens();
  converted.reserve_tokens = request.reserve_tokens();
  switch (request.mode()) {
    case v1::FETCH_MODE_DIRECT:
      converted.mode = FetchMode::kDirect;
      break;
    case v1::FETCH_MODE_SERVED:
      converted.mode = FetchMode::kServed;
      break;
    default:
      return absl::InvalidArgumentError(
          fmt::format("mode is {}, allowed are DIRECT, SERVED", static_cast<int>(request.mode())));
  }
  converted.idempotency_key = request.idempotency_key();
  return converted;
}

IngestRequest FromProto(const v1::IngestTokensRequest& request) {
  return {.sequence = request.sequence_id(),
          .position = request.position(),
          .count = request.count(),
          .layer_begin = request.layer_begin(),
          .layer_count = request.layer_count(),
          .arena = request.arena_id(),
          .ring_offset = request.ring_offset(),
          .end_of_prompt = request.end_of_prompt(),
          .idempotency_key = request.idempotency_key()};
}

absl::StatusOr<AuditRequest> FromProto(const v1::AuditStepRequest& request) {
  CKV_ASSIGN_OR_RETURN(TensorPlace slot, FromProto(request.slot(), "slot"));
  return AuditRequest{
      .sequence = request.sequence_id(), .layer = request.layer(), .slot = std::move(slot)};
}

absl::StatusOr<FetchRequest> FromProto(const v1::FetchClustersRequest& request) {
  FetchRequest converted{.layer = request.layer(),
                         .budget_tokens = request.budget_tokens(),
                         .items = {},
                         .want_output = request.want_output(),
                         .want_selection = request.want_selection()};
  for (const v1::FetchItem& item : request.items()) {
    FetchItem added;
    added.sequence = item.sequence_id();
    added.position = item.position();
    CKV_ASSIGN_OR_RETURN(added.q, FromProto(item.q(), "q"));
    CKV_ASSIGN_OR_RETURN(added.k, FromProto(item.k(), "k"));
    CKV_ASSIGN_OR_RETURN(added.v, FromProto(item.v(), "v"));
    if (item.has_output_arena()) {
      CKV_ASSIGN_OR_RETURN(added.output, FromProto(item.output_arena(), "output_arena"));
    }
    converted.items.push_back(std::move(added));
  }
  return converted;
}

void ToProto(FetchResult result, v1::FetchResult& reply) {
  reply.set_sequence_id(result.sequence);
  reply.set_output(FloatBytes(result.output));
  reply.set_lse(FloatBytes(result.lse));
  reply.mutable_selected_positions()->Add(result.selected.begin(), result.selected.end());
  reply.set_cut(result.cut);
  reply.set_hit_clusters(result.hit_clusters);
  reply.set_missed_clusters(result.missed_clusters);
  reply.set_hit_tokens(result.hit_tokens);
  reply.set_missed_tokens(result.missed_tokens);
  reply.set_gathered_bytes(result.gathered_bytes);
}

void ToProto(const SequenceStatus& status, v1::SequenceInfo& info) {
  info.set_sequence_id(status.sequence);
  info.set_session_id(status.session);
  info.mutable_shape()->set_layers(status.shape.layers);
  info.mutable_shape()->set_kv_heads(status.shape.kv_heads);
  info.mutable_shape()->set_q_heads(status.shape.q_heads);
  info.mutable_shape()->set_head_dim(status.shape.head_dim);
  info.mutable_shape()->set_dtype(ToProto(status.shape.dtype));
  info.set_mode(status.mode == FetchMode::kServed ? v1::FETCH_MODE_SERVED : v1::FETCH_MODE_DIRECT);
  info.set_max_tokens(status.max_tokens);
  info.set_ingested_tokens(status.ingested_tokens);
  info.set_prompt_tokens(status.prompt_tokens);
  info.set_published_segments(status.published_segments);
  info.set_cut(status.cut);
  info.set_host_bytes(status.host_bytes);
  info.set_state_bytes(status.state_bytes);
  info.set_failure(status.failure);
}

void ToProto(const DaemonStatus& status, v1::GetStatusReply& reply) {
  reply.set_boot_epoch(status.boot_epoch);
  reply.set_version(status.version);
  reply.set_backend(status.backend);
  reply.set_device(status.device);
  reply.set_ready(status.ready);
  reply.set_not_ready_reason(status.not_ready_reason);
  reply.set_sessions(status.sessions.size());
  reply.set_sequences(status.sequences);
  ToProto(status.host, *reply.mutable_host_bytes());
  reply.set_gpu_bytes_used(status.gpu_used_bytes);
  reply.set_uptime_seconds(status.uptime_seconds);
  reply.set_device_age_seconds(status.device_age_seconds);
  CountersToProto(status, *reply.mutable_counters());
  for (const SessionStatus& session : status.sessions) {
    v1::SessionInfo& info = *reply.add_session_list();
    info.set_session_id(session.session_id);
    info.set_client_name(session.client_name);
    info.set_pid(session.pid);
    info.set_uid(session.uid);
    info.set_sequences(session.sequences);
    info.set_host_bytes(session.host_bytes);
    info.set_gpu_bytes(session.gpu_bytes);
    info.set_age_seconds(session.age_seconds);
    info.set_attached(session.attached);
    if (session.grant != kNoGrant) info.set_grant(GrantText(session.grant));
  }
  for (const GrantStatus& grant : status.grants) {
    v1::GrantInfo& info = *reply.add_grant_list();
    info.set_grant(GrantText(grant.grant));
    ToProto(grant.host, *info.mutable_host_bytes());
  }
}

void ToProto(const RecentError& error, v1::RecentError& message) {
  message.set_time(error.time);
  message.set_level(error.level);
  message.set_text(error.text);
  message.set_count(error.count);
}

}  // namespace clusterkv::service
