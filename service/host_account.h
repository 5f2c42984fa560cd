// Who may take how much of the host pool.
//
// Chunks are taken through accounts: each grant has one, with its limit, and the sessions without a
// grant share the commons. What is offered to grants is kept for them, whether it has been granted
// yet or not, so that a grant finds its memory when it asks:
//
//   pool     |<------------- offered ------------->|<-- the commons' -->|
//            | grant a | grant b | not granted yet |
//
// An account holds what is reserved for it, lent, and in quarantine. A grant that was closed may
// hold something for a while, until its worker has unmapped it or is dead: that is the debt of
// those who come after it on its devices, who get so much less until then; others do not feel it.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "service/grant_id.h"
#include "service/host_pool.h"

namespace clusterkv::service {

class HostAccounts;

// Not thread-safe.
class HostAccount {
 public:
  // As of HostPool, within the account.
  // Errors: RESOURCE_EXHAUSTED that tells the account's limit and use, and nothing changes.
  absl::Status Reserve(uint32_t chunks);
  void Unreserve(uint32_t chunks);
  absl::StatusOr<PoolChunk> Lend(HostPool::Source source);
  void Quarantine(PoolChunk chunk);
  void Recycle(PoolChunk chunk);

  HostPool& pool() const { return pool_; }
  uint32_t limit_chunks() const { return limit_; }
  // The total is the limit.
  HostPoolStatus status() const;

 private:
  friend class HostAccounts;
  HostAccount(HostAccounts& accounts, GrantId grant, uint32_t limit);

  uint32_t held() const { return reserved_ + lent_ + quarantined_; }
  // What all that came before still hold. Forgets those that hold nothing.
  uint32_t Debt();

  HostAccounts& accounts_;
  HostPool& pool_;
  const GrantId grant_;
  const std::string name_;
  const uint32_t limit_;  // chunks
  bool open_ = true;
  std::set<std::shared_ptr<HostAccount>> former_;  // and those before them, each once
  uint32_t reserved_ = 0, lent_ = 0, quarantined_ = 0;
};

// Not thread-safe. Outlives its accounts.
class HostAccounts {
 public:
  // `offered_bytes` of the pool are kept for grants.
  // REQUIRES: whole chunks, at most the pool.
  HostAccounts(HostPool& pool, uint64_t offered_bytes);

  // `former` are the closed grants that had some of its devices; those that hold nothing any more,
  // or are unknown, do not matter.
  // REQUIRES: whole chunks.
  // Errors: ALREADY_EXISTS, RESOURCE_EXHAUSTED (more than is offered and not granted).
  absl::Status Open(GrantId grant, uint64_t bytes, const std::vector<GrantId>& former = {});
  // The account stays with those who hold it; it gets nothing more.
  void Close(GrantId grant);
  // Null if there is none; kNoGrant is the commons.
  std::shared_ptr<HostAccount> Find(GrantId grant) const;
  const std::map<GrantId, std::shared_ptr<HostAccount>>& grants() const { return grants_; }

 private:
  friend class HostAccount;

  HostPool& pool_;
  const uint32_t offered_;  // chunks
  const std::shared_ptr<HostAccount> commons_;
  std::map<GrantId, std::shared_ptr<HostAccount>> grants_;
  std::map<GrantId, std::shared_ptr<HostAccount>> closed_;  // that may be in someone's way
};

}  // namespace clusterkv::service
