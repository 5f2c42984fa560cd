// What `clusterkvd --help` prints, and the same as a page (deploy/CONFIGURATION.md): both are made
// from the table of keys.
#pragma once

#include <string>

#include "service/config.h"

namespace clusterkv::service {

std::string HelpText(const Config& defaults);
std::string HelpMarkdown(const Config& defaults);

}  // namespace clusterkv::service
