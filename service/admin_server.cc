#include "service/admin_server.h"

#include <fmt/format.h>
#include <httplib.h>
#include <pthread.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <thread>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_replace.h"
#include "gpu/status_macros.h"
#include "service/admin_page.h"
#include "service/metrics.h"
#include "service/recent_errors.h"
#include "service/status_history.h"
#include "service/status_json.h"

namespace clusterkv::service {
namespace {

constexpr char kText[] = "text/plain; charset=utf-8";
constexpr char kPrometheus[] = "text/plain; version=0.0.4; charset=utf-8";
constexpr char kJson[] = "application/json";
constexpr char kHtml[] = "text/html; charset=utf-8";
constexpr size_t kThreads = 4;
constexpr int kTimeoutSeconds = 5;
constexpr auto kStartPoll = std::chrono::milliseconds(1);
constexpr auto kStopPoll = std::chrono::milliseconds(20);

// The port of the socket's own end, if it is an accepted TCP connection; else -1.
int AcceptedPort(int fd) {
  int listening = 0;
  socklen_t size = sizeof(listening);
  if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &size) != 0 || listening != 0) {
    return -1;
  }
  sockaddr_storage address{};
  size = sizeof(address);
  if (getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) != 0) return -1;
  if (address.ss_family == AF_INET) {
    return ntohs(reinterpret_cast<const sockaddr_in&>(address).sin_port);
  }
  if (address.ss_family == AF_INET6) {
    return ntohs(reinterpret_cast<const sockaddr_in6&>(address).sin6_port);
  }
  return -1;
}

// The library's stop() waits for its connections, and a client that sends its request byte by byte
// would keep it waiting for ever. It tells nobody its sockets, hence this look at all of ours.
void ShutDownConnections(int port) {
  std::error_code error;
  for (std::filesystem::directory_iterator entry("/proc/self/fd", error), end;
       !error && entry != end; entry.increment(error)) {
    int fd = -1;
    if (absl::SimpleAtoi(entry->path().filename().string(), &fd) && AcceptedPort(fd) == port) {
      shutdown(fd, SHUT_RDWR);
    }
  }
}

// Its own script and style, and requests to where it came from: a browser runs nothing else, also
// if a name that a client gave were ever taken for markup.
void SendPage(httplib::Response& response) {
  std::string random(16, '\0');
  if (getrandom(random.data(), random.size(), 0) != static_cast<ssize_t>(random.size())) {
    response.status = 500;
    return;
  }
  const std::string nonce = absl::BytesToHexString(random);
  response.set_header("Content-Security-Policy",
                      fmt::format("default-src 'none'; script-src 'nonce-{0}'; "
                                  "style-src 'nonce-{0}'; connect-src 'self'; img-src data:; "
                                  "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
                                  nonce));
  response.set_header("Referrer-Policy", "no-referrer");
  response.set_content(
      absl::StrReplaceAll({kAdminPage.data(), kAdminPage.size()}, {{"PAGE_NONCE", nonce}}), kHtml);
}

class AdminServerImpl : public AdminServer {
 public:
  explicit AdminServerImpl(AdminOptions options) : options_(std::move(options)) {
    Bound();
    AddRoutes();
    RefuseOtherMethods();
  }

  ~AdminServerImpl() override {
    if (!thread_.joinable()) return;
    server_.stop();
    while (!stopped_.load()) {
      ShutDownConnections(port_);
      std::this_thread::sleep_for(kStopPoll);
    }
    thread_.join();
  }

  absl::Status Start() {
    const size_t colon = options_.listen.rfind(':');
    int port = 0;
    if (colon == std::string::npos || !absl::SimpleAtoi(options_.listen.substr(colon + 1), &port)) {
      return absl::InvalidArgumentError(
          fmt::format("admin-listen: '{}' is not HOST:PORT", options_.listen));
    }
    const std::string host = options_.listen.substr(0, colon);
    const bool brackets = host.starts_with('[') && host.ends_with(']');
    const std::string plain = brackets ? host.substr(1, host.size() - 2) : host;
    port_ = port;
    if (port == 0) {
      port_ = server_.bind_to_any_port(plain);
    } else if (!server_.bind_to_port(plain, port)) {
      port_ = -1;
    }
    if (port_ < 0) {
      return absl::UnavailableError(fmt::format("admin-listen: cannot bind {}", options_.listen));
    }
    address_ = fmt::format("{}:{}", host, port_);
    thread_ = std::thread([this] {
      server_.listen_after_bind();
      stopped_.store(true);
    });
    pthread_setname_np(thread_.native_handle(), "ckv-admin");
    // A stop() before that would be lost.
    while (!server_.is_running() && !stopped_.load()) std::this_thread::sleep_for(kStartPoll);
    return absl::OkStatus();
  }

  const std::string& address() const override { return address_; }

  void Sample() override { history_.Add(options_.status()); }

 private:
  // What one client may take.
  void Bound() {
    server_.new_task_queue = [] { return new httplib::ThreadPool(kThreads); };
    server_.set_read_timeout(kTimeoutSeconds, 0);
    server_.set_write_timeout(kTimeoutSeconds, 0);
    // A connection holds one of the few threads as long as it lives.
    server_.set_keep_alive_max_count(1);
    server_.set_default_headers(
        {{"Cache-Control", "no-store"}, {"X-Content-Type-Options", "nosniff"}});
    // Two daemons on one port must not both start: the library's own choice is SO_REUSEPORT.
    server_.set_socket_options([](int socket) {
      const int yes = 1;
      setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
    });
  }

  void AddRoutes() {
    server_.Get("/livez", [](const httplib::Request&, httplib::Response& response) {
      response.set_content("ok\n", kText);
    });
    server_.Get("/startupz", [](const httplib::Request&, httplib::Response& response) {
      response.set_content("ok\n", kText);  // this port opens once the daemon has started
    });
    server_.Get("/readyz", [this](const httplib::Request&, httplib::Response& response) {
      const DaemonStatus status = options_.status();
      if (!status.ready) response.status = 503;
      response.set_content(status.ready ? "ok\n" : status.not_ready_reason + "\n", kText);
    });
    server_.Get("/metrics", [this](const httplib::Request&, httplib::Response& response) {
      response.set_content(MetricsText(options_.status()), kPrometheus);
    });
    server_.Get("/version", [this](const httplib::Request&, httplib::Response& response) {
      response.set_content(options_.status().version + "\n", kText);
    });
    server_.Get("/status", [this](const httplib::Request&, httplib::Response& response) {
      response.set_content(StatusJson(options_.status(), DaemonErrors().List()), kJson);
    });
    server_.Get("/history", [this](const httplib::Request&, httplib::Response& response) {
      response.set_content(history_.Json(), kJson);
    });
    server_.Get("/sequences", [this](const httplib::Request&, httplib::Response& response) {
      const auto sequences = options_.sequences();
      if (!sequences.ok()) {
        response.status = 503;
        response.set_content(std::string(sequences.status().message()) + "\n", kText);
        return;
      }
      response.set_content(SequencesJson(options_.status().boot_epoch, *sequences), kJson);
    });
    server_.Get("/",
                [](const httplib::Request&, httplib::Response& response) { SendPage(response); });
    server_.set_error_handler([](const httplib::Request&, httplib::Response& response) {
      if (response.status != 404) return;
      response.set_content(
          "known are / /livez /readyz /startupz /metrics /version /status /history /sequences\n",
          kText);
    });
  }

  // Before routing, so that no body is read.
  void RefuseOtherMethods() {
    server_.set_pre_routing_handler(
        [](const httplib::Request& request, httplib::Response& response) {
          if (request.method == "GET" || request.method == "HEAD") {
            return httplib::Server::HandlerResponse::Unhandled;
          }
          response.status = 405;
          response.set_header("Allow", "GET, HEAD");
          response.set_content("only GET and HEAD\n", kText);
          return httplib::Server::HandlerResponse::Handled;
        });
  }

  const AdminOptions options_;
  StatusHistory history_;
  httplib::Server server_;
  int port_ = 0;
  std::string address_;
  std::atomic<bool> stopped_{false};
  std::thread thread_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<AdminServer>> AdminServer::Create(AdminOptions options) {
  auto server = std::make_unique<AdminServerImpl>(std::move(options));
  CKV_RETURN_IF_ERROR(server->Start());
  return std::unique_ptr<AdminServer>(std::move(server));
}

}  // namespace clusterkv::service
