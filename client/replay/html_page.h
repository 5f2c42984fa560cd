// html_report.html: REPORT_TITLE and REPORT_BODY stand where those go.
#pragma once

#include <string_view>

namespace clusterkv::client::replay {

extern const std::string_view kReportPage;

}  // namespace clusterkv::client::replay
