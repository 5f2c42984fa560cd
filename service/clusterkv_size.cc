// clusterkv-size: how much memory a model and a load need, before there is a daemon.
// Exit codes: 0 ok, 2 usage.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>

#include "gpu/dtype.h"
#include "gpu/status_macros.h"
#include "service/size_plan.h"
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

std::string Gib(uint64_t bytes) {
  return fmt::format("{:9.3f} GiB", static_cast<double>(bytes) / (1ull << 30));
}

// As a flag takes it, rounded up to MiB.
std::string Flag(uint64_t bytes) { return SizeText((bytes + (1ull << 20) - 1) >> 20 << 20); }

std::string Table(const Options& options, const SizePlan& plan) {
  const SizeQuestion& question = options.question;
  const gpu::MethodOptions method = question.method.Resolved(question.shape);
  const auto percent = [&](uint64_t bytes) {
    return fmt::format("{:5.1f} % of full KV",
                       100.0 * static_cast<double>(bytes) / static_cast<double>(plan.full_kv));
  };
  std::string text = fmt::format(
      "A sequence of {} tokens: {} layers, {} KV heads of {}, {};\n"
      "preset {}, budget {}, cluster cache {} tokens a layer and KV head\n",
      question.max_tokens, question.shape.layers, question.shape.kv_heads, question.shape.head_dim,
      options.dtype, options.preset, method.budget_tokens, method.cache_tokens);
  text += fmt::format("  full KV             {}\n", Gib(plan.full_kv));
  text += fmt::format("  GPU memory          {}  {}\n", Gib(plan.state), percent(plan.state));
  text += fmt::format("    cluster cache     {}\n", Gib(plan.cache));
  text += fmt::format("    clusters          {}\n", Gib(plan.clusters));
  text += fmt::format("    sinks, window     {}\n", Gib(plan.window));
  text += fmt::format("    slots of rows     {}\n", Gib(plan.rows));
  text += fmt::format("    the rest          {}\n", Gib(plan.rest));
  text += fmt::format("  host memory         {}  {}\n", Gib(plan.host), percent(plan.host));
  text += fmt::format("{} at the same time, of {} worker{}, need a daemon with at least\n",
                      question.sequences, question.workers, question.workers == 1 ? "" : "s");
  text += fmt::format("  --host-memory {} --host-chunk {} --gpu-memory {}\n",
                      Flag(plan.host_memory), SizeText(plan.host_chunk), Flag(plan.gpu_memory));
  return text;
}

std::string Json(const SizePlan& plan) {
  const nlohmann::ordered_json object = {{"sequence",
                                          {{"full_kv_bytes", plan.full_kv},
                                           {"gpu_bytes", plan.state},
                                           {"cache_bytes", plan.cache},
                                           {"clusters_bytes", plan.clusters},
                                           {"window_bytes", plan.window},
                                           {"rows_bytes", plan.rows},
                                           {"rest_bytes", plan.rest},
                                           {"host_bytes", plan.host}}},
                                         {"gpu_memory_bytes", plan.gpu_memory},
                                         {"host_memory_bytes", plan.host_memory},
                                         {"host_chunk_bytes", plan.host_chunk}};
  return object.dump(2) + "\n";
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
  std::cout << (options.format == "json" ? Json(*plan) : Table(options, *plan)) << std::flush;
  return 0;
}

}  // namespace
}  // namespace clusterkv::service

int main(int argc, char** argv) { return clusterkv::service::Main(argc, argv); }
