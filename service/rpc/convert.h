// Messages to core types and back. Checks only what the wire alone can get wrong (enums, missing
// parts); all else is the core's.
#pragma once

#include "absl/status/statusor.h"
#include "clusterkv/v1/sequence.pb.h"
#include "clusterkv/v1/session.pb.h"
#include "clusterkv/v1/status.pb.h"
#include "service/core_types.h"
#include "service/daemon_status.h"
#include "service/recent_errors.h"

namespace clusterkv::service {

SessionKey FromProto(const v1::SessionRef& session);
HelloInfo FromProto(const v1::Hello& hello);
// Errors: INVALID_ARGUMENT naming the field.
absl::StatusOr<RegisterRequest> FromProto(const v1::RegisterSequenceRequest& request);
IngestRequest FromProto(const v1::IngestTokensRequest& request);
absl::StatusOr<AuditRequest> FromProto(const v1::AuditStepRequest& request);
absl::StatusOr<FetchRequest> FromProto(const v1::FetchClustersRequest& request);

void ToProto(FetchResult result, v1::FetchResult& reply);
void ToProto(const SequenceStatus& status, v1::SequenceInfo& info);
void ToProto(const DaemonStatus& status, v1::GetStatusReply& reply);
void ToProto(const RecentError& error, v1::RecentError& message);

}  // namespace clusterkv::service
