#include "service/host_account.h"

#include <fmt/format.h>

#include <utility>

#include "gpu/status_macros.h"

namespace clusterkv::service {

HostAccount::HostAccount(HostAccounts& accounts, GrantId grant, uint32_t limit)
    : accounts_(accounts),
      pool_(accounts.pool_),
      grant_(grant),
      name_(grant == kNoGrant ? "host pool" : "grant " + GrantText(grant)),
      limit_(limit) {}

uint32_t HostAccount::Debt() {
  std::erase_if(former_, [](const auto& account) { return account->held() == 0; });
  uint32_t debt = 0;
  for (const auto& account : former_) debt += account->held();
  return debt;
}

absl::Status HostAccount::Reserve(uint32_t chunks) {
  if (!open_) return absl::FailedPreconditionError(name_ + " was revoked");
  // With nothing offered the commons is the pool, which says no by itself.
  const uint32_t debt = Debt();
  if (accounts_.offered_ > 0 && uint64_t{chunks} + held() + debt > limit_) {
    const uint64_t chunk = pool_.chunk_bytes();
    std::string more;
    if (debt > 0) {
      more = fmt::format(
          "; {} that former grants of its devices had are in quarantine and will be free soon",
          debt * chunk);
    }
    if (grant_ == kNoGrant) {
      more = fmt::format("; {} more are kept for the device plugin (--device-plugin-memory)",
                         accounts_.offered_ * chunk);
    }
    return absl::ResourceExhaustedError(fmt::format(
        "{}: {} bytes asked for, {} of {} in use ({} lent, {} reserved, {} in quarantine until the "
        "workers that had them have unmapped them){}",
        name_, chunks * chunk, held() * chunk, limit_ * chunk, lent_ * chunk, reserved_ * chunk,
        quarantined_ * chunk, more));
  }
  CKV_RETURN_IF_ERROR(pool_.Reserve(chunks));
  reserved_ += chunks;
  return absl::OkStatus();
}

void HostAccount::Unreserve(uint32_t chunks) {
  pool_.Unreserve(chunks);
  reserved_ -= chunks;
}

absl::StatusOr<PoolChunk> HostAccount::Lend(HostPool::Source source) {
  if (source == HostPool::Source::kFree) CKV_RETURN_IF_ERROR(Reserve(1));
  CKV_ASSIGN_OR_RETURN(const PoolChunk chunk, pool_.Lend(HostPool::Source::kReserved));
  --reserved_;
  ++lent_;
  return chunk;
}

void HostAccount::Quarantine(PoolChunk chunk) {
  pool_.Quarantine(chunk);
  --lent_;
  ++quarantined_;
}

void HostAccount::Recycle(PoolChunk chunk) {
  pool_.Recycle(chunk);
  --quarantined_;
}

HostPoolStatus HostAccount::status() const {
  const uint64_t chunk = pool_.chunk_bytes();
  return {.total_bytes = limit_ * chunk,
          .used_bytes = lent_ * chunk,
          .reserved_bytes = reserved_ * chunk,
          .quarantined_bytes = quarantined_ * chunk};
}

HostAccounts::HostAccounts(HostPool& pool, uint64_t offered_bytes)
    : pool_(pool),
      offered_(static_cast<uint32_t>(offered_bytes / pool.chunk_bytes())),
      commons_(new HostAccount(*this, kNoGrant, pool.chunk_count() - offered_)) {}

absl::Status HostAccounts::Open(GrantId grant, uint64_t bytes, const std::vector<GrantId>& former) {
  if (grants_.contains(grant)) {
    return absl::AlreadyExistsError(fmt::format("grant {} is open", GrantText(grant)));
  }
  uint64_t granted = 0;
  for (const auto& [id, account] : grants_) granted += account->limit_;
  const uint64_t chunks = bytes / pool_.chunk_bytes();
  if (granted + chunks > offered_) {
    return absl::ResourceExhaustedError(
        fmt::format("grant {}: {} bytes asked for, {} of {} offered are granted", GrantText(grant),
                    bytes, granted * pool_.chunk_bytes(), offered_ * pool_.chunk_bytes()));
  }
  std::erase_if(closed_,
                [](const auto& one) { return one.second->held() == 0 && one.second->Debt() == 0; });
  std::shared_ptr<HostAccount> account(
      new HostAccount(*this, grant, static_cast<uint32_t>(chunks)));
  for (const GrantId id : former) {
    const auto found = closed_.find(id);
    if (found == closed_.end()) continue;
    account->former_.insert(found->second);
    account->former_.insert(found->second->former_.begin(), found->second->former_.end());
  }
  grants_[grant] = std::move(account);
  return absl::OkStatus();
}

void HostAccounts::Close(GrantId grant) {
  const auto found = grants_.find(grant);
  if (found == grants_.end()) return;
  found->second->open_ = false;
  closed_[grant] = std::move(found->second);
  grants_.erase(found);
}

std::shared_ptr<HostAccount> HostAccounts::Find(GrantId grant) const {
  if (grant == kNoGrant) return commons_;
  const auto found = grants_.find(grant);
  return found == grants_.end() ? nullptr : found->second;
}

}  // namespace clusterkv::service
