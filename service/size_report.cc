#include "service/size_report.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "gpu/dtype.h"
#include "service/size_text.h"

namespace clusterkv::service {
namespace {

std::string Gib(uint64_t bytes) {
  return fmt::format("{:9.3f} GiB", static_cast<double>(bytes) / (1ull << 30));
}

// As a flag takes it, rounded up to MiB.
std::string Flag(uint64_t bytes) { return SizeText((bytes + (1ull << 20) - 1) >> 20 << 20); }

}  // namespace

std::string SizeTable(const SizeQuestion& question, const std::string& preset,
                      const SizePlan& plan) {
  const gpu::MethodOptions method = question.method.Resolved(question.shape);
  const auto percent = [&](uint64_t bytes) {
    return fmt::format("{:5.1f} % of full KV",
                       100.0 * static_cast<double>(bytes) / static_cast<double>(plan.full_kv));
  };
  std::string text = fmt::format(
      "A sequence of {} tokens: {} layers, {} KV heads of {}, {};\n"
      "preset {}, budget {}, cluster cache {} tokens a layer and KV head\n",
      question.max_tokens, question.shape.layers, question.shape.kv_heads, question.shape.head_dim,
      gpu::DTypeName(question.shape.dtype), preset, method.budget_tokens, method.cache_tokens);
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
  text += fmt::format("  and as containers ask for clusterkv.io/host-gib: {}{}\n", plan.worker_gib,
                      question.workers == 1 ? "" : " each");
  return text;
}

std::string SizeJson(const SizePlan& plan) {
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
                                         {"host_chunk_bytes", plan.host_chunk},
                                         {"worker_gib", plan.worker_gib}};
  return object.dump(2) + "\n";
}

}  // namespace clusterkv::service
