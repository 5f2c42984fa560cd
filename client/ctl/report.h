// What clusterkvctl prints: one JSON object (contract: names and nesting are what scripts rely on)
// or a table for people.
#pragma once

#include <string>
#include <vector>

#include "clusterkv/v1/status.pb.h"

namespace clusterkv::client::ctl {

// Round trips of GetStatus, in microseconds, in the order they were made.
struct PingTimes {
  std::string address;
  std::vector<double> microseconds;  // at least one
};

std::string PingJson(const PingTimes& times);
std::string PingTable(const PingTimes& times);
// As the admin port's /status.
std::string StatusJson(const v1::GetStatusReply& status);
std::string StatusTable(const v1::GetStatusReply& status);
std::string SessionsJson(const v1::GetStatusReply& status);
std::string SessionsTable(const v1::GetStatusReply& status);
std::string SequencesJson(const v1::ListSequencesReply& list);
std::string SequencesTable(const v1::ListSequencesReply& list);

}  // namespace clusterkv::client::ctl
