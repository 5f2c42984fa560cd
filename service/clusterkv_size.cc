// clusterkv-size: how much memory a model and a load need, before there is a daemon.
// Exit codes: 0 ok, 2 usage.
#include <CLI/CLI.hpp>
#include <iostream>
#include <string>

#include "gpu/dtype.h"
#include "gpu/status_macros.h"
#include "service/size_plan.h"
#include "service/size_report.h"
#include "service/size_text.h"
#include "service/version.h"

namespace clusterkv::service {
namespace {

struct Options {
  SizeQuestion question{.shape = {.layers = 32, .kv_heads = 8, .q_heads = 32, .head_dim = 128},
                        .method = {}};
  std::string dtype = "bf16", preset = "default", format = "table";
  std::string ring = "64mb", host_chunk = "auto";
  uint32_t budget = 1024, cache_tokens = 0;
};

void Declare(CLI::App& app, Options& options) {
  SizeQuestion& question = options.question;
  const auto add = [&app](const char* name, auto& value, const char* help) {
    app.add_option(name, value, help)->capture_default_str();
  };
  add("--layers", question.shape.layers, "layers whose KV clusterkv manages");
  add("--kv-heads", question.shape.kv_heads, "KV heads (of one worker, if the model is split)");
  add("--q-heads", question.shape.q_heads, "query heads");
  add("--head-dim", question.shape.head_dim, "64, 96, 128 or 256");
  add("--dtype", options.dtype, "bf16, fp16 or fp32");
  app.add_option("--tokens", question.max_tokens, "of a sequence, prompt and answer")->required();
  add("--sequences", question.sequences, "at the same time");
  add("--workers", question.workers, "processes that share them");
  add("--preset", options.preset, "of the method");
  add("--budget", options.budget, "clustered tokens attended per KV head and step");
  add("--cache-tokens", options.cache_tokens,
      "cluster cache per layer and KV head; 0 = 4 x budget + the largest cluster");
  add("--ring", options.ring, "ingest ring of a worker");
  add("--host-chunk", options.host_chunk, "as of the daemon");
  app.add_option("--format", options.format, "what to print")
      ->check(CLI::IsMember({"table", "json"}))
      ->capture_default_str();
  app.set_version_flag("--version", kVersion);
}

absl::StatusOr<SizePlan> Plan(Options& options) {
  SizeQuestion& question = options.question;
  CKV_ASSIGN_OR_RETURN(question.shape.dtype, gpu::ParseDType(options.dtype));
  CKV_ASSIGN_OR_RETURN(question.method, gpu::MethodPreset(options.preset));
  question.method.budget_tokens = options.budget;
  question.method.cache_tokens = options.cache_tokens;
  CKV_ASSIGN_OR_RETURN(question.ring_bytes, ParseSize(options.ring));
  if (options.host_chunk != "auto") {
    CKV_ASSIGN_OR_RETURN(question.host_chunk_bytes, ParseSize(options.host_chunk));
  }
  return PlanSize(question);
}

int Main(int argc, char** argv) {
  Options options;
  CLI::App app("How much memory a clusterkvd needs for a model and a load.", "clusterkv-size");
  Declare(app, options);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  const absl::StatusOr<SizePlan> plan = Plan(options);
  if (!plan.ok()) {
    std::cerr << "clusterkv-size: " << std::string(plan.status().message()) << "\n";
    return 2;
  }
  std::cout << (options.format == "json" ? SizeJson(*plan)
                                         : SizeTable(options.question, options.preset, *plan))
            << std::flush;
  return 0;
}

}  // namespace
}  // namespace clusterkv::service

int main(int argc, char** argv) { return clusterkv::service::Main(argc, argv); }
