// Counts the calls of the gRPC service under the names that gRPC servers usually export.
//
// Each handler counts its own call, from when gRPC hands it over to when it is answered. What gRPC
// itself turns away (no such method, a message that does not parse) is not among them.
#pragma once

#include <grpcpp/support/status.h>

#include <chrono>
#include <cstddef>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "service/daemon_status.h"

namespace clusterkv::service {

// Thread-safe.
class RpcCounters {
 public:
  RpcCounters();  // all methods of clusterkv.v1.ClusterKv, at 0

  // REQUIRES: the service has such a method.
  size_t IndexOf(std::string_view method) const;
  void Started(size_t method);
  void Handled(size_t method, grpc::StatusCode code, double seconds);

  std::vector<RpcStatus> status() const;

 private:
  const std::vector<std::string> names_;  // of methods_, for look-ups without the lock
  mutable std::mutex mu_;
  std::vector<RpcStatus> methods_;  // guarded by mu_
};

// A reactor that counts its call. Answer instead of Finish.
template <typename Reactor>
class CountedReactor : public Reactor {
 public:
  CountedReactor(RpcCounters& counters, std::string_view method)
      : counters_(counters), method_(counters.IndexOf(method)), begun_(Clock::now()) {
    counters_.Started(method_);
  }

  // gRPC may delete the reactor before this returns.
  void Answer(const grpc::Status& status) {
    counters_.Handled(method_, status.error_code(),
                      std::chrono::duration<double>(Clock::now() - begun_).count());
    this->Finish(status);
  }

 private:
  using Clock = std::chrono::steady_clock;

  RpcCounters& counters_;
  const size_t method_;
  const Clock::time_point begun_;
};

}  // namespace clusterkv::service
