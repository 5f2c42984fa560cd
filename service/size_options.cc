#include "service/size_options.h"

#include <CLI/CLI.hpp>

#include "gpu/dtype.h"
#include "gpu/status_macros.h"
#include "service/size_text.h"
#include "service/version.h"

namespace clusterkv::service {
namespace {

// As typed, before it means anything.
struct Typed {
  gpu::Shape shape{.layers = 32, .kv_heads = 8, .q_heads = 32, .head_dim = 128};
  uint32_t tokens = 0, sequences = 1, workers = 1, budget = 1024, cache_tokens = 0;
  std::string dtype = "bf16", preset = "default", format = "table";
  std::string ring = "64mb", host_chunk = "auto";
};

void Declare(CLI::App& app, Typed& typed) {
  const auto add = [&app](const char* name, auto& value, const char* help) {
    return app.add_option(name, value, help)->capture_default_str();
  };
  add("--layers", typed.shape.layers, "layers whose KV clusterkv manages");
  add("--kv-heads", typed.shape.kv_heads, "KV heads (of one worker, if the model is split)");
  add("--q-heads", typed.shape.q_heads, "query heads");
  add("--head-dim", typed.shape.head_dim, "64, 96, 128 or 256");
  add("--dtype", typed.dtype, "bf16, fp16 or fp32");
  app.add_option("--tokens", typed.tokens, "of a sequence, prompt and answer")->required();
  add("--sequences", typed.sequences, "at the same time");
  add("--workers", typed.workers, "processes that share them");
  add("--preset", typed.preset, "of the method");
  add("--budget", typed.budget, "clustered tokens attended per KV head and step");
  add("--cache-tokens", typed.cache_tokens,
      "cluster cache per layer and KV head; 0 = 4 x budget + the largest cluster");
  add("--ring", typed.ring, "ingest ring of a worker");
  add("--host-chunk", typed.host_chunk, "as of the daemon");
  add("--format", typed.format, "what to print")->check(CLI::IsMember({"table", "json"}));
  app.set_version_flag("--version", kVersion);
}

absl::StatusOr<SizeOptions> Understand(const Typed& typed) {
  SizeOptions options;
  options.preset = typed.preset;
  options.json = typed.format == "json";
  SizeQuestion& question = options.question;
  question.shape = typed.shape;
  question.max_tokens = typed.tokens;
  question.sequences = typed.sequences;
  question.workers = typed.workers;
  CKV_ASSIGN_OR_RETURN(question.shape.dtype, gpu::ParseDType(typed.dtype));
  CKV_ASSIGN_OR_RETURN(question.method, gpu::MethodPreset(typed.preset));
  question.method.budget_tokens = typed.budget;
  question.method.cache_tokens = typed.cache_tokens;
  CKV_ASSIGN_OR_RETURN(question.ring_bytes, ParseSize(typed.ring));
  if (typed.host_chunk != "auto") {
    CKV_ASSIGN_OR_RETURN(question.host_chunk_bytes, ParseSize(typed.host_chunk));
  }
  return options;
}

}  // namespace

absl::StatusOr<std::optional<SizeOptions>> ParseSizeOptions(int argc, const char* const* argv) {
  Typed typed;
  CLI::App app("How much memory a clusterkvd needs for a model and a load.", "clusterkv-size");
  Declare(app, typed);
  // CLI11 reports by exceptions; they end here.
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& asked) {
    app.exit(asked);
    return std::nullopt;
  } catch (const CLI::ParseError& error) {
    return absl::InvalidArgumentError(error.what());
  }
  CKV_ASSIGN_OR_RETURN(SizeOptions options, Understand(typed));
  return options;
}

}  // namespace clusterkv::service
