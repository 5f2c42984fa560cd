#include "service/device_plugin/grant_store.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <utility>

#include "gpu/status_macros.h"
#include "service/logging.h"

namespace clusterkv::service {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr char kRecordSuffix[] = ".json";
constexpr char kTemporarySuffix[] = ".json.new";
constexpr int kRecordVersion = 1;

absl::Status FromErrno(const std::string& what) {
  return absl::ErrnoToStatus(errno, ("grants-dir: " + what).c_str());
}

absl::Status FromError(const std::error_code& error, const std::string& what) {
  return absl::ErrnoToStatus(error.value(), ("grants-dir: " + what).c_str());
}

absl::StatusOr<std::vector<fs::path>> Entries(const std::string& directory) {
  std::error_code error;
  std::vector<fs::path> paths;
  for (fs::directory_iterator at(directory, error), end; !error && at != end; at.increment(error)) {
    paths.push_back(at->path());
  }
  if (error) return FromError(error, "cannot read " + directory);
  std::ranges::sort(paths);
  return paths;
}

std::string RecordText(const GrantRecord& record) {
  return Json{{"version", kRecordVersion}, {"devices", record.devices}}.dump() + "\n";
}

absl::StatusOr<GrantRecord> ReadRecord(GrantId grant, const fs::path& path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  if (!file) return absl::UnavailableError("it cannot be read");
  const Json json = Json::parse(text.str(), nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || json.value("version", Json()) != kRecordVersion ||
      !json.contains("devices") || !json["devices"].is_array()) {
    return absl::InvalidArgumentError(fmt::format("it is no record of version {}", kRecordVersion));
  }
  GrantRecord record{.grant = grant, .devices = {}};
  for (const Json& device : json["devices"]) {
    if (!device.is_string()) return absl::InvalidArgumentError("a device is no text");
    record.devices.push_back(device.get<std::string>());
  }
  return record;
}

absl::Status WriteFile(const std::string& path, const std::string& text) {
  gpu::UniqueFd file(
      open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!file.valid()) return FromErrno("cannot make " + path);
  const ssize_t written = write(file.get(), text.data(), text.size());
  if (written < 0) return FromErrno("cannot write " + path);
  if (static_cast<size_t>(written) != text.size()) {
    return absl::ResourceExhaustedError(fmt::format("grants-dir: no room for {}", path));
  }
  if (fsync(file.get()) != 0) return FromErrno("cannot synchronise " + path);
  return absl::OkStatus();
}

}  // namespace

GrantStore::GrantStore(std::string directory, gpu::UniqueFd lock, gpu::UniqueFd handle)
    : directory_(std::move(directory)), lock_(std::move(lock)), handle_(std::move(handle)) {}

absl::StatusOr<std::unique_ptr<GrantStore>> GrantStore::Open(const std::string& directory) {
  std::error_code error;
  fs::create_directories(directory, error);
  if (error) return FromError(error, "cannot make " + directory);
  if (chmod(directory.c_str(), 0700) != 0) return FromErrno("cannot set 0700 on " + directory);
  gpu::UniqueFd handle(open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!handle.valid()) return FromErrno("cannot open " + directory);
  const std::string lock_path = directory + "/lock";
  gpu::UniqueFd lock(open(lock_path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!lock.valid()) return FromErrno("cannot open " + lock_path);
  if (flock(lock.get(), LOCK_EX | LOCK_NB) != 0) {
    return absl::FailedPreconditionError(
        fmt::format("grants-dir: {} is used by another daemon", directory));
  }
  std::unique_ptr<GrantStore> store(new GrantStore(directory, std::move(lock), std::move(handle)));
  CKV_RETURN_IF_ERROR(store->RemoveDebris());
  return store;
}

absl::StatusOr<std::vector<GrantRecord>> GrantStore::Load() {
  std::vector<GrantRecord> records;
  std::set<std::string> taken;
  CKV_ASSIGN_OR_RETURN(const std::vector<fs::path> paths, Entries(directory_));
  for (const fs::path& path : paths) {
    if (path.extension() != kRecordSuffix) continue;
    const auto grant = ParseGrantText(path.stem().string());
    if (!grant) continue;  // a file of somebody else's
    auto record = ReadRecord(*grant, path);
    if (record.ok() && std::ranges::any_of(record->devices, [&](const std::string& device) {
          return taken.contains(device);
        })) {
      record = absl::InvalidArgumentError("a device of it is another grant's too");
    }
    if (!record.ok()) {
      LogError("grant dropped",
               {{"record", path.string()}, {"why", std::string(record.status().message())}});
      CKV_RETURN_IF_ERROR(Remove(*grant));
      continue;
    }
    CKV_RETURN_IF_ERROR(MakeFolder(*grant));
    taken.insert(record->devices.begin(), record->devices.end());
    records.push_back(*std::move(record));
  }
  return records;
}

absl::Status GrantStore::Add(const GrantRecord& record) {
  const std::string path = record_path(record.grant);
  const std::string temporary = folder(record.grant) + kTemporarySuffix;
  const auto add = [&]() -> absl::Status {
    CKV_RETURN_IF_ERROR(MakeFolder(record.grant));
    CKV_RETURN_IF_ERROR(WriteFile(temporary, RecordText(record)));
    if (rename(temporary.c_str(), path.c_str()) != 0) return FromErrno("cannot make " + path);
    return Synchronize();
  };
  absl::Status added = add();
  if (!added.ok()) {
    unlink(temporary.c_str());
    if (absl::Status left = Remove(record.grant); !left.ok()) {
      LogError("grant left behind", {{"record", path}, {"why", std::string(left.message())}});
    }
  }
  return added;
}

absl::Status GrantStore::Remove(GrantId grant) {
  const std::string path = record_path(grant);
  if (unlink(path.c_str()) != 0 && errno != ENOENT) return FromErrno("cannot remove " + path);
  CKV_RETURN_IF_ERROR(Synchronize());
  // Without its record the folder is debris, whatever becomes of it now.
  std::error_code error;
  fs::remove_all(folder(grant), error);
  if (error) {
    LogWarning("folder of a grant left behind",
               {{"folder", folder(grant)}, {"why", error.message()}});
  }
  return absl::OkStatus();
}

std::string GrantStore::folder(GrantId grant) const { return directory_ + "/" + GrantText(grant); }

std::string GrantStore::record_path(GrantId grant) const { return folder(grant) + kRecordSuffix; }

absl::Status GrantStore::MakeFolder(GrantId grant) const {
  const std::string path = folder(grant);
  if (mkdir(path.c_str(), 0755) != 0 && errno != EEXIST) return FromErrno("cannot make " + path);
  // Whatever the process's mask is.
  if (chmod(path.c_str(), 0755) != 0) return FromErrno("cannot set 0755 on " + path);
  return absl::OkStatus();
}

absl::Status GrantStore::RemoveDebris() const {
  CKV_ASSIGN_OR_RETURN(const std::vector<fs::path> paths, Entries(directory_));
  for (const fs::path& path : paths) {
    const std::string name = path.filename().string();
    const bool temporary = name.ends_with(kTemporarySuffix) &&
                           ParseGrantText(name.substr(0, name.find('.'))).has_value();
    const auto grant = ParseGrantText(name);
    std::error_code error;
    const bool orphan = grant && !fs::exists(record_path(*grant), error);
    if (error) return FromError(error, "cannot look at " + record_path(*grant));
    if (!temporary && !orphan) continue;
    fs::remove_all(path, error);
    if (error) return FromError(error, "cannot remove " + path.string());
    LogInfo("removed what a crash left", {{"path", path.string()}});
  }
  return absl::OkStatus();
}

absl::Status GrantStore::Synchronize() const {
  if (fsync(handle_.get()) != 0) return FromErrno("cannot synchronise " + directory_);
  return absl::OkStatus();
}

}  // namespace clusterkv::service
