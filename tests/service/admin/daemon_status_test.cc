// What the workers of a grant see of the daemon.
#include "service/daemon_status.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace clusterkv::service {
namespace {

SessionStatus Session(uint64_t id, uint64_t sequences, uint64_t gpu_bytes, GrantId grant) {
  SessionStatus session;
  session.session_id = id;
  session.sequences = sequences;
  session.gpu_bytes = gpu_bytes;
  session.grant = grant;
  return session;
}

DaemonStatus SomeStatus() {
  DaemonStatus status;
  status.version = "1.2.3";
  status.sequences = 9;
  status.gpu_used_bytes = 900;
  status.direct.hit_clusters = status.served.missed_clusters = 7;
  status.ingested_tokens = status.sessions_started = status.rejected_attaches = 7;
  status.host = {.total_bytes = 1000, .used_bytes = 500};
  status.sessions = {Session(1, 2, 10, kNoGrant), Session(2, 3, 20, 0xa), Session(3, 1, 40, 0xb),
                     Session(4, 1, 80, 0xa)};
  status.grants = {{.grant = 0xa, .host = {.total_bytes = 100, .used_bytes = 50}},
                   {.grant = 0xb, .host = {.total_bytes = 200, .used_bytes = 60}}};
  return status;
}

TEST(StatusOfGrant, IsThatOfItsSessionsAndItsMemory) {
  const DaemonStatus seen = StatusOfGrant(SomeStatus(), 0xa);
  EXPECT_EQ(seen.version, "1.2.3");
  ASSERT_EQ(seen.sessions.size(), 2u);
  EXPECT_EQ(seen.sessions[0].session_id, 2u);
  EXPECT_EQ(seen.sessions[1].session_id, 4u);
  EXPECT_EQ(seen.sequences, 4u);
  EXPECT_EQ(seen.gpu_used_bytes, 100u);
  EXPECT_EQ(seen.host.total_bytes, 100u);
  EXPECT_EQ(seen.host.used_bytes, 50u);
  EXPECT_EQ(seen.grants.size(), 1u);
  // What is counted for all together is not for one of them to see.
  EXPECT_EQ(seen.direct.hit_clusters + seen.served.missed_clusters, 0u);
  EXPECT_EQ(seen.ingested_tokens + seen.sessions_started + seen.rejected_attaches, 0u);
}

TEST(StatusOfGrant, OfOneThatWasRevokedIsEmpty) {
  const DaemonStatus seen = StatusOfGrant(SomeStatus(), 0xc);
  EXPECT_TRUE(seen.sessions.empty() && seen.grants.empty());
  EXPECT_EQ(seen.host.total_bytes, 0u);
  EXPECT_EQ(seen.sequences, 0u);
}

TEST(StatusOfGrant, OfTheDaemonsOwnSocketIsEverything) {
  const DaemonStatus seen = StatusOfGrant(SomeStatus(), kNoGrant);
  EXPECT_EQ(seen.sessions.size(), 4u);
  EXPECT_EQ(seen.host.total_bytes, 1000u);
  EXPECT_EQ(seen.sequences, 9u);
  EXPECT_EQ(seen.ingested_tokens, 7u);
}

TEST(GrantText, HasOneSpelling) {
  EXPECT_EQ(GrantText(0xabc), "0000000000000abc");
  for (const GrantId grant : {GrantId{1}, GrantId{0xfedcba9876543210}, ~GrantId{0}}) {
    EXPECT_EQ(ParseGrantText(GrantText(grant)), grant);
  }
  for (const char* text :
       {"", "0", "0000000000000000", "abc", "0000000000000ABC", "0x00000000000abc",
        "00000000000000abc", "000000000000000g", "0000000000000abc.json", "-000000000000abc"}) {
    EXPECT_EQ(ParseGrantText(text), std::nullopt) << text;
  }
}

}  // namespace
}  // namespace clusterkv::service
