// What clusterkv-size prints.
#pragma once

#include <string>

#include "service/size_plan.h"

namespace clusterkv::service {

std::string SizeTable(const SizeQuestion& question, const std::string& preset,
                      const SizePlan& plan);
std::string SizeJson(const SizePlan& plan);

}  // namespace clusterkv::service
