#include "client/grpc_status.h"

#include <grpcpp/support/status.h>
#include <gtest/gtest.h>

namespace clusterkv::client {
namespace {

TEST(GrpcStatus, KeepsEveryCode) {
  for (int code = 1; code <= 16; ++code) {
    const grpc::Status wire(static_cast<grpc::StatusCode>(code), "pool full");
    const absl::Status status = FromGrpc(wire, "RegisterSequence");
    EXPECT_EQ(static_cast<int>(status.code()), code);
    EXPECT_EQ(status.message(), "RegisterSequence: pool full");
  }
  EXPECT_TRUE(FromGrpc(grpc::Status::OK, "x").ok());
}

TEST(GrpcStatus, CallsWhatIsNoCodeUnknown) {
  EXPECT_TRUE(absl::IsUnknown(FromCode(17, "odd")));
  EXPECT_TRUE(absl::IsUnknown(FromCode(-1, "odd")));
  EXPECT_TRUE(FromCode(0, "fine").ok());
  EXPECT_EQ(FromCode(8, "full"), absl::ResourceExhaustedError("full"));
}

TEST(GrpcStatus, WithoutAnAnswerTheCallMayHaveHappened) {
  EXPECT_TRUE(MayHaveHappened(absl::DeadlineExceededError("")));
  EXPECT_TRUE(MayHaveHappened(absl::UnavailableError("")));
  EXPECT_FALSE(MayHaveHappened(absl::ResourceExhaustedError("")));
  EXPECT_FALSE(MayHaveHappened(absl::OkStatus()));
}

TEST(GrpcStatus, AnnotateKeepsTheCode) {
  EXPECT_EQ(Annotate(absl::NotFoundError("gone"), "sequence 3"),
            absl::NotFoundError("sequence 3: gone"));
  EXPECT_TRUE(Annotate(absl::OkStatus(), "x").ok());
}

}  // namespace
}  // namespace clusterkv::client
