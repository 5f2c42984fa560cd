// clusterkv-size: how much memory a model and a load need, before there is a daemon.
// Exit codes: 0 ok, 2 usage.
#include <iostream>
#include <string>

#include "absl/status/status.h"
#include "service/size_options.h"
#include "service/size_plan.h"
#include "service/size_report.h"

namespace clusterkv::service {
namespace {

int Refuse(const absl::Status& why) {
  std::cerr << "clusterkv-size: " << std::string(why.message()) << "\n";
  return 2;
}

int Main(int argc, char** argv) {
  const auto options = ParseSizeOptions(argc, argv);
  if (!options.ok()) return Refuse(options.status());
  if (!options->has_value()) return 0;
  const SizeQuestion& question = (*options)->question;
  const absl::StatusOr<SizePlan> plan = PlanSize(question);
  if (!plan.ok()) return Refuse(plan.status());
  std::cout << ((*options)->json ? SizeJson(*plan) : SizeTable(question, (*options)->preset, *plan))
            << std::flush;
  return 0;
}

}  // namespace
}  // namespace clusterkv::service

int main(int argc, char** argv) { return clusterkv::service::Main(argc, argv); }
