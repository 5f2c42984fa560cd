#include "service/device_plugin/grants.h"

#include <fmt/format.h>
#include <sys/random.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <future>
#include <set>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_join.h"
#include "gpu/status_macros.h"
#include "service/core.h"
#include "service/logging.h"

namespace clusterkv::service {
namespace {

constexpr char kDevicePrefix[] = "gib-";

GrantId NewGrantId() {
  GrantId grant = kNoGrant;
  while (grant == kNoGrant) {
    if (getrandom(&grant, sizeof(grant), 0) != sizeof(grant)) std::abort();
  }
  return grant;
}

// Waits for the core's answer; it never waits for us.
absl::Status Await(const std::function<void(Completion<bool>)>& call) {
  const auto promise = std::make_shared<std::promise<absl::Status>>();
  call([promise](const absl::StatusOr<bool>& done) { promise->set_value(done.status()); });
  return promise->get_future().get();
}

}  // namespace

Grants::Grants(const GrantsOptions& options, ServiceCore& core, GrantSockets& sockets,
               std::unique_ptr<GrantStore> store)
    : options_(options), core_(core), sockets_(sockets), store_(std::move(store)) {}

absl::StatusOr<std::unique_ptr<Grants>> Grants::Open(const GrantsOptions& options,
                                                     ServiceCore& core, GrantSockets& sockets) {
  CKV_ASSIGN_OR_RETURN(std::unique_ptr<GrantStore> store, GrantStore::Open(options.directory));
  CKV_ASSIGN_OR_RETURN(const std::vector<GrantRecord> records, store->Load());
  std::unique_ptr<Grants> grants(new Grants(options, core, sockets, std::move(store)));
  for (const GrantRecord& record : records) {
    const uint64_t bytes = grants->BytesOf(record.devices);
    if (bytes < record.devices.size() * options.device_bytes) {
      LogWarning("a grant has shrunk with the pool",
                 {{"grant", GrantText(record.grant)},
                  {"devices", absl::StrJoin(record.devices, ",")},
                  {"bytes", bytes}});
    }
    CKV_RETURN_IF_ERROR(grants->OpenGrant(record));
  }
  return grants;
}

std::string Grants::DeviceId(uint32_t device) { return kDevicePrefix + std::to_string(device); }

DeviceIds Grants::devices() const {
  DeviceIds all;
  for (uint32_t i = 0; i < options_.devices; ++i) all.push_back(DeviceId(i));
  return all;
}

bool Grants::Known(const std::string& device) const {
  uint32_t number = 0;
  return device.starts_with(kDevicePrefix) &&
         absl::SimpleAtoi(device.substr(sizeof(kDevicePrefix) - 1), &number) &&
         number < options_.devices && device == DeviceId(number);
}

GrantId Grants::OwnerOf(const std::string& device) const {
  const auto found = owners_.find(device);
  return found == owners_.end() ? kNoGrant : found->second;
}

uint64_t Grants::BytesOf(const DeviceIds& devices) const {
  const auto known =
      std::ranges::count_if(devices, [&](const std::string& device) { return Known(device); });
  return static_cast<uint64_t>(known) * options_.device_bytes;
}

absl::Status Grants::Check(const std::vector<DeviceIds>& containers) const {
  std::set<std::string> seen;
  for (const DeviceIds& devices : containers) {
    if (devices.empty()) return absl::InvalidArgumentError("a container asks for no device");
    for (const std::string& device : devices) {
      if (!Known(device)) {
        return absl::InvalidArgumentError(fmt::format("unknown device '{}'; there are {} to {}",
                                                      device, DeviceId(0),
                                                      DeviceId(options_.devices - 1)));
      }
      if (!seen.insert(device).second) {
        return absl::InvalidArgumentError(fmt::format("device {} is asked for twice", device));
      }
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<Grant>> Grants::Allocate(const std::vector<DeviceIds>& containers) {
  CKV_RETURN_IF_ERROR(Check(containers));
  for (const DeviceIds& devices : containers) {
    for (const std::string& device : devices) {
      const GrantId owner = OwnerOf(device);
      if (owner == kNoGrant) continue;
      CKV_RETURN_IF_ERROR(Revoke(owner, fmt::format("{} was allocated anew", device)));
    }
  }
  std::vector<Grant> made;
  for (const DeviceIds& devices : containers) {
    auto grant = Make(devices);
    if (grant.ok()) {
      made.push_back(*std::move(grant));
      continue;
    }
    for (const Grant& other : made) {
      if (absl::Status left = Revoke(other.grant, "its pod was refused"); !left.ok()) {
        LogError("grant left behind",
                 {{"grant", GrantText(other.grant)}, {"why", std::string(left.message())}});
      }
    }
    return grant.status();
  }
  return made;
}

absl::StatusOr<Grant> Grants::Make(const DeviceIds& devices) {
  const GrantRecord record{.grant = NewGrantId(), .devices = devices};
  CKV_RETURN_IF_ERROR(store_->Add(record));
  if (absl::Status failed = OpenGrant(record); !failed.ok()) {
    CKV_RETURN_IF_ERROR(store_->Remove(record.grant));
    return failed;
  }
  LogInfo("granted",
          {{"grant", GrantText(record.grant)}, {"devices", absl::StrJoin(devices, ",")}});
  return Grant{
      .grant = record.grant, .folder = store_->folder(record.grant), .bytes = BytesOf(devices)};
}

absl::Status Grants::OpenGrant(const GrantRecord& record) {
  std::vector<GrantId> former;
  for (const std::string& device : record.devices) {
    const auto found = former_.find(device);
    if (found != former_.end() && std::ranges::find(former, found->second) == former.end()) {
      former.push_back(found->second);
    }
  }
  CKV_RETURN_IF_ERROR(Await([&](Completion<bool> done) {
    core_.OpenGrant(record.grant, BytesOf(record.devices), former, std::move(done));
  }));
  absl::Status opened = sockets_.Open(record.grant, store_->folder(record.grant));
  if (!opened.ok()) {
    // A core that is stopping may refuse that, and then needs it no more.
    Await([&](Completion<bool> done) {
      core_.RevokeGrant(record.grant, opened, std::move(done));
    }).IgnoreError();
    return opened;
  }
  grants_[record.grant] = record.devices;
  for (const std::string& device : record.devices) owners_[device] = record.grant;
  return absl::OkStatus();
}

absl::Status Grants::Revoke(GrantId grant, const std::string& why) {
  const absl::Status reason =
      absl::AbortedError(fmt::format("grant {} was revoked: {}", GrantText(grant), why));
  CKV_RETURN_IF_ERROR(
      Await([&](Completion<bool> done) { core_.RevokeGrant(grant, reason, std::move(done)); }));
  sockets_.Close(grant);
  // Until the record is gone it is ours: revoking it again does no harm.
  CKV_RETURN_IF_ERROR(store_->Remove(grant));
  for (const std::string& device : grants_[grant]) {
    owners_.erase(device);
    former_[device] = grant;
  }
  grants_.erase(grant);
  LogInfo("grant revoked", {{"grant", GrantText(grant)}, {"why", why}});
  return absl::OkStatus();
}

DeviceIds Grants::Prefer(const Preference& preference) const {
  std::set<GrantId> busy;
  for (const SessionStatus& session : core_.status().sessions) busy.insert(session.grant);
  DeviceIds chosen = preference.must_include;
  DeviceIds rest;
  for (const std::string& device : preference.available) {
    if (std::ranges::find(chosen, device) == chosen.end()) rest.push_back(device);
  }
  const auto rank = [&](const std::string& device) {
    const GrantId owner = OwnerOf(device);
    const int harm = owner == kNoGrant ? 0 : busy.contains(owner) ? 2 : 1;
    return std::pair(harm, owner);  // of one grant together, so that few are revoked
  };
  std::ranges::stable_sort(rest, {}, rank);
  for (const std::string& device : rest) {
    if (chosen.size() >= preference.count) break;
    chosen.push_back(device);
  }
  return chosen;
}

}  // namespace clusterkv::service
