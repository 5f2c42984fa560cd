// One tick of `clusterkvctl top`, for people and as JSON.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "client/ctl/styled_line.h"
#include "client/ctl/top/rates.h"
#include "clusterkv/v1/status.pb.h"

namespace clusterkv::client::ctl {

struct TopTick {
  std::string time;  // RFC 3339
  std::string address;
  v1::GetStatusReply status;   // the last that came
  std::optional<Rates> rates;  // nullopt: the first of this daemon
  std::string error;           // why `status` is not of now; empty: it is
};

// Sessions come with the most memory first, before them grants, where there are any.
std::vector<StyledLine> TopLines(const TopTick& tick);
// One line, without its line break.
std::string TopJson(const TopTick& tick);

}  // namespace clusterkv::client::ctl
