// The replay's result as one HTML file for researchers: charts, tables, and the JSON itself. It
// needs nothing else, and runs no script.
#pragma once

#include <string>

#include "client/replay/report.h"

namespace clusterkv::client::replay {

std::string ReportHtml(const Report& report);

}  // namespace clusterkv::client::replay
