#include "client/fetch_calls.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "client/grpc_status.h"

namespace clusterkv::client {
namespace {

// More than messages have beside the tensors and the items of the request.
constexpr uint64_t kAnswerItemBytes = 128;
constexpr uint64_t kRequestIdBytes = 128;

}  // namespace

absl::StatusOr<v1::FetchClustersReply> FetchCalls::Call(v1::FetchClustersRequest request,
                                                        uint64_t answer_bytes,
                                                        const Deadline& deadline) {
  answer_bytes += static_cast<uint64_t>(request.items_size()) * kAnswerItemBytes;
  if (socket_ == nullptr || answer_bytes > FetchSocket::kMaxPacketBytes ||
      request.ByteSizeLong() + kRequestIdBytes > FetchSocket::kMaxPacketBytes) {
    return connection_.FetchClusters(request, deadline);
  }
  v1::FetchCall call;
  *call.mutable_request() = std::move(request);
  call.set_request_id(connection_.NextRequestId());
  absl::StatusOr<v1::FetchAnswer> answer = socket_->Call(call, deadline);
  if (answer.ok() && answer->code() == 0) return std::move(*answer->mutable_reply());
  const std::string what = connection_.Describe("FetchClusters", call.request_id());
  if (answer.ok()) return FromCode(answer->code(), absl::StrCat(what, ": ", answer->message()));
  socket_.reset();
  return Annotate(answer.status(), what);
}

}  // namespace clusterkv::client
