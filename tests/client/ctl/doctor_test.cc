#include "client/ctl/doctor/doctor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tests/client/ctl/fake_root.h"

namespace clusterkv::client::ctl {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::Not;

std::vector<std::string> Names(const std::vector<Check>& checks) {
  std::vector<std::string> names;
  for (const Check& check : checks) names.push_back(check.name);
  return names;
}

const Check& Find(const std::vector<Check>& checks, const std::string& name) {
  for (const Check& check : checks) {
    if (check.name == name) return check;
  }
  ADD_FAILURE() << "no check " << name;
  return checks.front();
}

TEST(Doctor, ChecksEverythingOnAMachineWithoutGpuOrDaemon) {
  const FakeRoot root;
  const auto checks = RunDoctor(Machine(root.path()), {},
                                {.address = "unix:" + root.path() + "/none.sock",
                                 .timeout = absl::Seconds(2),
                                 .version = "1.0.0"});
  EXPECT_THAT(Names(checks), ElementsAre("driver", "GPU sharing", "MPS", "container toolkit",
                                         "memlock", "host memory", "huge pages", "NUMA", "kernel",
                                         "gRPC socket", "attach socket", "daemon"));
  for (const char* name : {"driver", "GPU sharing", "MPS", "container toolkit"}) {
    EXPECT_EQ(Find(checks, name).verdict, Verdict::kSkip) << name;
  }
  for (const char* name : {"gRPC socket", "attach socket", "daemon"}) {
    EXPECT_EQ(Find(checks, name).verdict, Verdict::kFail) << name;
  }
  EXPECT_TRUE(AnyFailed(checks));
}

TEST(Doctor, PreflightExpectsNoDaemon) {
  const FakeRoot root;
  const auto checks = RunDoctor(Machine(root.path()), {},
                                {.address = "unix:/none", .preflight = true, .version = "1.0.0"});
  for (const char* name : {"gRPC socket", "attach socket", "daemon"}) {
    EXPECT_EQ(Find(checks, name).verdict, Verdict::kSkip) << name;
  }
  EXPECT_FALSE(AnyFailed(checks));
}

TEST(Doctor, EveryFindingThatIsWrongSaysWhatToDo) {
  FakeRoot root;
  root.Gpu("0000:65:00.0", "1")
      .Write("/sys/devices/system/node/online", "0-1")
      .Write("/proc/self/status", "Mems_allowed_list: 0")
      .Write("/proc/self/limits", "Max locked memory 65536 65536 bytes")
      .Write("/proc/self/mountinfo", "22 1 0:20 / / rw - ext4 /dev/sda1 rw")
      .Write("/var/lib/dpkg/status", "Package: nvidia-container-toolkit\nVersion: 1.15.0-1")
      .Write("/tmp/nvidia-mps/nvidia-cuda-mps-control.pid", "99");
  const auto checks =
      RunDoctor(Machine(root.path()), {}, {.address = "unix:/none", .version = "1"});
  size_t wrong = 0;
  for (const Check& check : checks) {
    if (check.verdict == Verdict::kOk || check.verdict == Verdict::kSkip) continue;
    EXPECT_THAT(check.advice, Not(testing::IsEmpty())) << check.name;
    ++wrong;
  }
  EXPECT_GE(wrong, 8u);
}

const std::vector<Check> kChecks = {
    {.name = "one", .verdict = Verdict::kOk, .found = "fine", .advice = ""},
    {.name = "two", .verdict = Verdict::kFail, .found = "evil\x1b[2J", .advice = "do it"},
    {.name = "three", .verdict = Verdict::kWarn, .found = "so so", .advice = "think"}};

TEST(Doctor, JsonIsOneObject) {
  const auto json = nlohmann::json::parse(DoctorJson(kChecks));
  EXPECT_EQ(json["checks"].size(), 3u);
  EXPECT_EQ(
      json["checks"][1],
      nlohmann::json(
          {{"name", "two"}, {"verdict", "fail"}, {"found", "evil\x1b[2J"}, {"advice", "do it"}}));
  EXPECT_EQ(json["ok"], 1);
  EXPECT_EQ(json["warn"], 1);
  EXPECT_EQ(json["fail"], 1);
  EXPECT_EQ(json["skip"], 0);
}

TEST(Doctor, TableIsForPeople) {
  const std::string plain = DoctorTable(kChecks, /*colour=*/false);
  EXPECT_THAT(plain, HasSubstr("ok    one                fine\n"));
  EXPECT_THAT(plain, HasSubstr("fail  two                evil?[2J\n"
                               "                         -> do it\n"));
  EXPECT_THAT(plain, HasSubstr("1 ok, 1 to think about, 1 failed, 0 skipped\n"));
  EXPECT_THAT(plain, Not(HasSubstr("\x1b")));
  EXPECT_THAT(DoctorTable(kChecks, /*colour=*/true), HasSubstr("\x1b[31mfail"));
}

}  // namespace
}  // namespace clusterkv::client::ctl
