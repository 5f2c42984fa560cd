// The daemon's address where none is given, and the attach socket beside it.
#include "client/address.h"

#include <gtest/gtest.h>

#include <cstdlib>

namespace clusterkv::client {
namespace {

TEST(Address, ComesFromTheEnvironmentOrIsTheDaemonsDefault) {
  unsetenv("CLUSTERKV_ADDRESS");
  EXPECT_EQ(DefaultAddress(), "unix:/run/clusterkv/clusterkvd.sock");
  setenv("CLUSTERKV_ADDRESS", "", 1);
  EXPECT_EQ(DefaultAddress(), "unix:/run/clusterkv/clusterkvd.sock");
  setenv("CLUSTERKV_ADDRESS", "unix:/elsewhere/s.sock", 1);
  EXPECT_EQ(DefaultAddress(), "unix:/elsewhere/s.sock");
  unsetenv("CLUSTERKV_ADDRESS");
}

TEST(Address, ARelativeAttachPathBeginsBesideTheGrpcSocket) {
  EXPECT_EQ(ResolveAttachPath("unix:/run/c/s.sock", "s.sock.attach"), "/run/c/s.sock.attach");
  EXPECT_EQ(ResolveAttachPath("unix:///run/c/s.sock", "s.sock.attach"), "/run/c/s.sock.attach");
  EXPECT_EQ(ResolveAttachPath("unix:c/s.sock", "a"), "c/a");
  EXPECT_EQ(ResolveAttachPath("unix:s.sock", "a"), "a");
  EXPECT_EQ(ResolveAttachPath("unix:/run/c/s.sock", "/elsewhere/a"), "/elsewhere/a");
  EXPECT_EQ(ResolveAttachPath("127.0.0.1:80", "/run/a"), "/run/a");
}

}  // namespace
}  // namespace clusterkv::client
