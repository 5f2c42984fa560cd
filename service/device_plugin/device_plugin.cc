#include "service/device_plugin/device_plugin.h"

#include <fmt/format.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <filesystem>
#include <functional>
#include <mutex>
#include <optional>
#include <utility>

#include "gpu/status_macros.h"
#include "service/core.h"
#include "service/device_plugin/kubelet.h"
#include "service/device_plugin/plugin_service.h"
#include "service/logging.h"
#include "service/rpc/without_reflection.h"
#include "service/task_queue.h"

namespace clusterkv::service {
namespace {

constexpr char kEndpoint[] = "clusterkv.sock";
constexpr char kKubeletSocket[] = "kubelet.sock";
constexpr size_t kQueueCapacity = 1024;
// How long the kubelet may take to watch us before we register again.
constexpr absl::Duration kWatchTimeout = absl::Seconds(5);
constexpr absl::Duration kServerTimeout = absl::Seconds(1);

class DevicePluginImpl : public DevicePlugin, public PluginRequests {
 public:
  DevicePluginImpl(const DevicePluginOptions& options, ServiceCore& core,
                   std::unique_ptr<GrantSockets> sockets, std::unique_ptr<Grants> grants)
      : core_(core),
        path_(options.directory + "/" + kEndpoint),
        kubelet_path_(options.directory + "/" + kKubeletSocket),
        sockets_(std::move(sockets)),
        grants_(std::move(grants)),
        service_(grants_->devices(), *this),
        grants_queue_("ckv-grants", kQueueCapacity),
        link_queue_("ckv-kubelet", kQueueCapacity) {}
  ~DevicePluginImpl() override { Shutdown(absl::ZeroDuration()); }

  absl::Status StartServer() {
    if (Answers(path_)) {
      return absl::FailedPreconditionError(
          fmt::format("device-plugin-dir: another device plugin serves {}", path_));
    }
    grpc::ServerBuilder builder;
    builder.SetOption(std::make_unique<WithoutReflection>());
    builder.AddListeningPort("unix:" + path_, grpc::InsecureServerCredentials());
    builder.RegisterService(&service_);
    server_ = builder.BuildAndStart();
    if (server_ == nullptr) {
      return absl::UnavailableError(fmt::format("device-plugin-dir: cannot bind {}", path_));
    }
    if (chmod(path_.c_str(), 0600) != 0) {
      return absl::ErrnoToStatus(errno, ("device-plugin-dir: mode of " + path_).c_str());
    }
    identity_ = IdentityOf(path_);
    return absl::OkStatus();
  }

  void Tick() override {
    // One that waits does for all.
    if (ticking_.exchange(true)) return;
    if (!link_queue_.TryPost([this] { DoTick(); })) ticking_ = false;
  }

  bool registered() const override { return registered_ && service_.watchers() > 0; }

  void Allocate(std::vector<DeviceIds> containers, Completion<std::vector<Grant>> done) override {
    Post<std::vector<Grant>>(std::move(done), [this, containers = std::move(containers)] {
      return grants_->Allocate(containers);
    });
  }

  void Prefer(std::vector<Preference> containers,
              Completion<std::vector<DeviceIds>> done) override {
    Post<std::vector<DeviceIds>>(std::move(done), [this, containers = std::move(containers)] {
      std::vector<DeviceIds> chosen;
      for (const Preference& container : containers) chosen.push_back(grants_->Prefer(container));
      return absl::StatusOr<std::vector<DeviceIds>>(std::move(chosen));
    });
  }

  void Shutdown(absl::Duration timeout) override {
    std::call_once(once_, [&] {
      const absl::Time deadline = absl::Now() + timeout;
      link_queue_.Stop();
      registered_ = false;
      StopServer(timeout);
      grants_queue_.Stop();
      sockets_->CloseAll(std::max(deadline - absl::Now(), absl::ZeroDuration()));
    });
  }

 private:
  template <typename T>
  void Post(Completion<T> done, std::function<absl::StatusOr<T>()> work) {
    if (!grants_queue_.TryPost([done, work = std::move(work)] { done(work()); })) {
      done(absl::UnavailableError("the daemon is stopping, or has too many calls waiting"));
    }
  }

  // --- On the link's thread, and after it has ended ----------------------------------------------

  void StopServer(absl::Duration timeout) {
    if (server_ == nullptr) return;
    service_.EndWatches();
    server_->Shutdown(absl::ToChronoTime(absl::Now() + timeout));
    server_->Wait();
    server_.reset();
  }

  void DoTick() {
    ticking_ = false;
    const bool ready = core_.status().ready;
    service_.SetHealthy(ready);
    grants_queue_.TryPost([this, ready] { sockets_->SetServing(ready); });
    const absl::Status status = Link();
    // Once for each reason: this runs every second.
    const std::string problem(status.message());
    if (std::exchange(problem_, problem) != problem && !problem.empty()) {
      LogWarning("the kubelet does not know of us", {{"why", problem}});
    }
  }

  // Not the time of change: that of a file's mode counts too.
  bool Stands() const {
    const auto now = IdentityOf(path_);
    return now && identity_ && now->device == identity_->device && now->inode == identity_->inode;
  }

  // Errors: why the kubelet cannot reach us, or we it.
  absl::Status Link() {
    if (server_ == nullptr || !Stands()) {
      registered_ = false;
      // Ours is gone; whatever lies there now must stay, so look before gRPC removes the path.
      if (Answers(path_)) {
        return absl::FailedPreconditionError(
            fmt::format("device-plugin-dir: another device plugin serves {}", path_));
      }
      StopServer(kServerTimeout);
      CKV_RETURN_IF_ERROR(StartServer());
      LogInfo("made the device plugin's socket again", {{"path", path_}});
    }
    const auto kubelet = IdentityOf(kubelet_path_);
    if (!kubelet) {
      registered_ = false;
      return absl::UnavailableError(kubelet_path_ + " is not there");
    }
    const bool watched = service_.watchers() > 0;
    if (watched) watched_at_ = absl::Now();
    const bool watch_is_due = !watched && absl::Now() - watched_at_ > kWatchTimeout;
    if (registered_ && kubelet == kubelet_identity_ && !watch_is_due) return absl::OkStatus();
    registered_ = false;
    CKV_RETURN_IF_ERROR(RegisterWithKubelet(kubelet_path_, kEndpoint));
    kubelet_identity_ = kubelet;
    watched_at_ = absl::Now();
    registered_ = true;
    LogInfo("registered with the kubelet",
            {{"resource", kResourceName}, {"socket", kubelet_path_}});
    return absl::OkStatus();
  }

  ServiceCore& core_;
  const std::string path_, kubelet_path_;
  std::atomic<bool> ticking_ = false, registered_ = false;
  std::once_flag once_;
  // The grants' thread.
  const std::unique_ptr<GrantSockets> sockets_;
  const std::unique_ptr<Grants> grants_;

  PluginService service_;
  // The link's thread.
  std::unique_ptr<grpc::Server> server_;
  std::optional<FileIdentity> identity_, kubelet_identity_;
  absl::Time watched_at_;
  std::string problem_;

  // Last: their threads end before what they use. Two, because a server that shuts down waits for
  // its calls, which the grants' thread answers.
  TaskQueue grants_queue_, link_queue_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<DevicePlugin>> DevicePlugin::Create(
    const DevicePluginOptions& options, ServiceCore& core, std::unique_ptr<GrantSockets> sockets) {
  std::error_code error;
  if (!std::filesystem::is_directory(options.directory, error)) {
    return absl::FailedPreconditionError(
        fmt::format("device-plugin-dir: {} is no directory that can be read: is there a kubelet on "
                    "this node, and is it mounted here?",
                    options.directory));
  }
  CKV_ASSIGN_OR_RETURN(auto grants, Grants::Open(options.grants, core, *sockets));
  auto plugin =
      std::make_unique<DevicePluginImpl>(options, core, std::move(sockets), std::move(grants));
  CKV_RETURN_IF_ERROR(plugin->StartServer());
  return std::unique_ptr<DevicePlugin>(std::move(plugin));
}

}  // namespace clusterkv::service
