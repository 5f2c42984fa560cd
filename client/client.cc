#include "client/client.h"

#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/batch_direct.h"
#include "client/batch_served.h"
#include "client/client_session.h"
#include "client/sequence_impl.h"
#include "gpu/status_macros.h"

namespace clusterkv::client {
namespace {

class ClientImpl final : public Client {
 public:
  explicit ClientImpl(std::shared_ptr<ClientSession> session) : session_(std::move(session)) {}
  ~ClientImpl() override { session_->Close(); }

  absl::StatusOr<std::unique_ptr<Sequence>> RegisterSequence(
      const SequenceOptions& options) override {
    return SequenceImpl::Register(session_, options);
  }
  absl::StatusOr<std::unique_ptr<DecodeBatch>> CreateBatch(const std::vector<Sequence*>& sequences,
                                                           const BatchOptions& options) override;

  const std::string& backend() const override { return session_->welcome().backend(); }
  gpu::Device& device() override { return session_->device(); }
  uint64_t session_id() const override { return session_->welcome().session_id(); }
  absl::Status health() const override { return session_->health(); }

 private:
  absl::StatusOr<std::vector<SequenceImpl*>> CheckBatch(
      const std::vector<Sequence*>& sequences) const;

  const std::shared_ptr<ClientSession> session_;
};

absl::StatusOr<std::vector<SequenceImpl*>> ClientImpl::CheckBatch(
    const std::vector<Sequence*>& sequences) const {
  if (sequences.empty()) return absl::InvalidArgumentError("a batch of no sequences");
  std::vector<SequenceImpl*> checked;
  std::set<Sequence*> seen;
  for (Sequence* const sequence : sequences) {
    auto* const own = dynamic_cast<SequenceImpl*>(sequence);
    if (own == nullptr || &own->session() != session_.get()) {
      return absl::InvalidArgumentError("a sequence of the batch is not of this client");
    }
    if (!seen.insert(sequence).second) {
      return absl::InvalidArgumentError(
          absl::StrCat("sequence ", own->id(), " is in the batch twice"));
    }
    const SequenceOptions& first = sequences.front()->options();
    if (!(own->options().shape == first.shape) || own->options().mode != first.mode) {
      return absl::InvalidArgumentError(
          absl::StrCat("sequence ", own->id(), " has another shape or mode than the first"));
    }
    checked.push_back(own);
  }
  return checked;
}

absl::StatusOr<std::unique_ptr<DecodeBatch>> ClientImpl::CreateBatch(
    const std::vector<Sequence*>& sequences, const BatchOptions& options) {
  CKV_RETURN_IF_ERROR(health());
  CKV_ASSIGN_OR_RETURN(std::vector<SequenceImpl*> checked, CheckBatch(sequences));
  if (checked.front()->direct()) return DirectBatch::Create(std::move(checked), options);
  if (checked.size() > ServedBatch::kMaxSequences) {
    return absl::InvalidArgumentError(absl::StrCat("a served batch of ", checked.size(),
                                                   " sequences; allowed: at most ",
                                                   ServedBatch::kMaxSequences));
  }
  return ServedBatch::Create(std::move(checked), options);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Client>> Client::Connect(const ClientOptions& options) {
  CKV_ASSIGN_OR_RETURN(std::shared_ptr<ClientSession> session, ClientSession::Open(options));
  return std::unique_ptr<Client>(std::make_unique<ClientImpl>(std::move(session)));
}

}  // namespace clusterkv::client
