#include "service/admin_server.h"

#include <fmt/format.h>
#include <httplib.h>
#include <pthread.h>

#include <cstdlib>
#include <thread>
#include <utility>

#include "gpu/status_macros.h"
#include "service/metrics.h"
#include "service/status_json.h"

namespace clusterkv::service {
namespace {

constexpr char kText[] = "text/plain; charset=utf-8";
constexpr char kPrometheus[] = "text/plain; version=0.0.4; charset=utf-8";
constexpr char kJson[] = "application/json";
constexpr size_t kThreads = 2;
constexpr size_t kMaxPayloadBytes = 4096;
constexpr int kTimeoutSeconds = 5;

class AdminServerImpl : public AdminServer {
 public:
  explicit AdminServerImpl(AdminOptions options) : options_(std::move(options)) { AddRoutes(); }
  ~AdminServerImpl() override {
    server_.stop();
    if (thread_.joinable()) thread_.join();
  }

  absl::Status Start() {
    const size_t colon = options_.listen.rfind(':');
    const std::string host = options_.listen.substr(0, colon);
    int port = std::atoi(options_.listen.c_str() + colon + 1);
    const std::string plain = host == "[::1]" ? "::1" : host;
    if (port == 0) {
      port = server_.bind_to_any_port(plain);
    } else if (!server_.bind_to_port(plain, port)) {
      port = -1;
    }
    if (port < 0) {
      return absl::UnavailableError(fmt::format("admin-listen: cannot bind {}", options_.listen));
    }
    address_ = fmt::format("{}:{}", host, port);
    thread_ = std::thread([this] { server_.listen_after_bind(); });
    pthread_setname_np(thread_.native_handle(), "ckv-admin");
    return absl::OkStatus();
  }

  const std::string& address() const override { return address_; }

 private:
  void AddRoutes() {
    server_.new_task_queue = [] { return new httplib::ThreadPool(kThreads); };
    server_.set_payload_max_length(kMaxPayloadBytes);
    server_.set_read_timeout(kTimeoutSeconds, 0);
    server_.set_write_timeout(kTimeoutSeconds, 0);
    server_.set_keep_alive_timeout(kTimeoutSeconds);
    // Two daemons on one port must not both start.
    server_.set_socket_options([](int socket) {
      const int yes = 1;
      setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
    });
    server_.Get("/livez", [](const httplib::Request&, httplib::Response& response) {
      response.set_content("ok\n", kText);
    });
    const auto ready = [this](const httplib::Request&, httplib::Response& response) {
      const DaemonStatus status = options_.status();
      if (!status.ready) response.status = 503;
      response.set_content(status.ready ? "ok\n" : status.not_ready_reason + "\n", kText);
    };
    server_.Get("/readyz", ready);
    server_.Get("/startupz", [](const httplib::Request&, httplib::Response& response) {
      response.set_content("ok\n", kText);  // this port opens once the daemon has started
    });
    server_.Get("/metrics", [this](const httplib::Request&, httplib::Response& response) {
      response.set_content(MetricsText(options_.status()), kPrometheus);
    });
    server_.Get("/version", [this](const httplib::Request&, httplib::Response& response) {
      response.set_content(options_.status().version + "\n", kText);
    });
    server_.Get("/status", [this](const httplib::Request&, httplib::Response& response) {
      response.set_content(StatusJson(options_.status()), kJson);
    });
    const auto refuse = [](const httplib::Request&, httplib::Response& response) {
      response.status = 405;
      response.set_header("Allow", "GET, HEAD");
      response.set_content("only GET and HEAD\n", kText);
    };
    server_.Post(".*", refuse);
    server_.Put(".*", refuse);
    server_.Delete(".*", refuse);
    server_.Patch(".*", refuse);
    server_.Options(".*", refuse);
  }

  const AdminOptions options_;
  httplib::Server server_;
  std::string address_;
  std::thread thread_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<AdminServer>> AdminServer::Create(AdminOptions options) {
  auto server = std::make_unique<AdminServerImpl>(std::move(options));
  CKV_RETURN_IF_ERROR(server->Start());
  return std::unique_ptr<AdminServer>(std::move(server));
}

}  // namespace clusterkv::service
