// What a check of `clusterkvctl doctor` found.
#pragma once

#include <string>

namespace clusterkv::client::ctl {

enum class Verdict { kOk, kWarn, kFail, kSkip };

struct Check {
  std::string name;
  Verdict verdict = Verdict::kSkip;
  std::string found;
  std::string advice;  // what to do about it; may be empty where nothing is wrong
};

}  // namespace clusterkv::client::ctl
