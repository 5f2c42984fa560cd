// An option for gRPC servers that need no reflection.
#pragma once

#include <grpcpp/impl/server_builder_option.h>
#include <grpcpp/impl/server_builder_plugin.h>

#include <memory>
#include <vector>

namespace clusterkv::service {

// The reflection library puts itself into every server of the program that links it. Its calls are
// synchronous, so that each server has a thread for them.
class WithoutReflection : public grpc::ServerBuilderOption {
 public:
  void UpdateArguments(grpc::ChannelArguments*) override {}
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
    plugins->clear();
  }
};

}  // namespace clusterkv::service
