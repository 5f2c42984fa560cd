#include "client/replay/options.h"

#include <algorithm>
#include <charconv>
#include <iostream>
#include <iterator>
#include <utility>

#include "CLI/CLI.hpp"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "client/replay/preset_keys.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::replay {
namespace {

constexpr size_t kMaxBudgets = 64;
constexpr uint32_t kMaxBudgetTokens = 1'048'576;
constexpr size_t kMaxCacheSizes = 32;
// As many as a daemon takes: sessions, and sequences of one.
constexpr uint32_t kMaxProcesses = 64;
constexpr uint32_t kMaxSequences = 1024;

// As typed, before it means anything.
struct RawOptions {
  std::string methods = "clusterkv,quest,window,oracle";
  std::string budgets = "128,256,512,1024";
  std::vector<std::string> settings;
  std::string cache_tokens, mode = "direct", sequences = "1", workers = "1", steps, seed = "0";
  std::string repeat = "1";
  std::string audit_rate = "0";
  std::string format = "table", publish = "sync", worker_index, worker_address, worker_cache_tokens,
              result_fd;
};

absl::Status Disallowed(const std::string& option, const std::string& value,
                        const std::string& allowed) {
  return absl::InvalidArgumentError(
      absl::StrCat(option, " is \"", value, "\"; allowed: ", allowed));
}

template <typename T>
absl::StatusOr<T> ParseNumber(const std::string& option, const std::string& text, T least, T most) {
  T value = 0;
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error == std::errc() && stop == end && value >= least && value <= most) return value;
  return Disallowed(option, text, absl::StrCat(least, " to ", most));
}

// One of a few names.
template <typename T>
absl::StatusOr<T> ParseName(const std::string& option, const std::string& text,
                            const std::vector<std::pair<std::string, T>>& names) {
  for (const auto& [name, value] : names) {
    if (text == name) return value;
  }
  const auto only_name = [](std::string* out, const auto& entry) { out->append(entry.first); };
  return Disallowed(option, text, absl::StrJoin(names, ", ", only_name));
}

template <typename T>
void AddOnce(std::vector<T>& list, T value) {
  if (std::find(list.begin(), list.end(), value) == list.end()) list.push_back(value);
}

absl::Status ParseLists(const RawOptions& raw, ReplayOptions& options) {
  for (const std::string& part : std::vector<std::string>(absl::StrSplit(raw.methods, ','))) {
    CKV_ASSIGN_OR_RETURN(const Method method, ParseName<Method>("--methods", part,
                                                                {{"clusterkv", Method::kClusterkv},
                                                                 {"quest", Method::kQuest},
                                                                 {"window", Method::kWindow},
                                                                 {"oracle", Method::kOracle}}));
    AddOnce(options.methods, method);
  }
  for (const std::string& part : std::vector<std::string>(absl::StrSplit(raw.budgets, ','))) {
    CKV_ASSIGN_OR_RETURN(const uint32_t budget,
                         ParseNumber<uint32_t>("--budgets", part, 1, kMaxBudgetTokens));
    AddOnce(options.budgets, budget);
  }
  if (options.budgets.size() <= kMaxBudgets) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("--budgets has ", options.budgets.size(),
                                                 " budgets; allowed: up to ", kMaxBudgets));
}

// The first size is the run's, the others are the sweep.
absl::Status ParseCacheTokens(const RawOptions& raw, ReplayOptions& options) {
  std::vector<uint32_t> sizes;
  for (const std::string& part : std::vector<std::string>(absl::StrSplit(raw.cache_tokens, ','))) {
    CKV_ASSIGN_OR_RETURN(const uint32_t size,
                         ParseNumber<uint32_t>("--cache-tokens", part, 0, UINT32_MAX));
    AddOnce(sizes, size);
  }
  if (sizes.size() > kMaxCacheSizes) {
    return absl::InvalidArgumentError(absl::StrCat("--cache-tokens has ", sizes.size(),
                                                   " sizes; allowed: up to ", kMaxCacheSizes));
  }
  if (sizes.size() > 1 && !options.Has(Method::kClusterkv)) {
    return absl::InvalidArgumentError(
        "--cache-tokens has several sizes, and only clusterkv has a cache; --methods does not have "
        "it");
  }
  options.method.cache_tokens = sizes.front();
  options.cache_sweep.assign(sizes.begin() + 1, sizes.end());
  return absl::OkStatus();
}

absl::Status ParseMethod(const RawOptions& raw, ReplayOptions& options) {
  absl::StatusOr<gpu::MethodOptions> preset = gpu::MethodPreset(options.preset);
  if (!preset.ok()) {
    return absl::InvalidArgumentError(absl::StrCat("--", preset.status().message()));
  }
  options.method = *preset;
  for (const std::string& setting : raw.settings) {
    if (const absl::Status status = SetPresetKey(setting, options.method); !status.ok()) {
      return absl::InvalidArgumentError(absl::StrCat("--set: ", status.message()));
    }
  }
  return raw.cache_tokens.empty() ? absl::OkStatus() : ParseCacheTokens(raw, options);
}

absl::Status ParseRest(const RawOptions& raw, ReplayOptions& options) {
  CKV_ASSIGN_OR_RETURN(options.mode, ParseName<FetchMode>("--mode", raw.mode,
                                                          {{"direct", FetchMode::kDirect},
                                                           {"served", FetchMode::kServed}}));
  CKV_ASSIGN_OR_RETURN(options.format,
                       ParseName<Format>("--format", raw.format,
                                         {{"table", Format::kTable}, {"json", Format::kJson}}));
  CKV_ASSIGN_OR_RETURN(options.publish,
                       ParseName<Publish>("--publish", raw.publish,
                                          {{"sync", Publish::kSync}, {"async", Publish::kAsync}}));
  CKV_ASSIGN_OR_RETURN(
      options.backend,
      ParseName<std::string>("--backend", options.backend,
                             {{"auto", "auto"}, {"host", "host"}, {"cuda", "cuda"}}));
  CKV_ASSIGN_OR_RETURN(options.sequences,
                       ParseNumber<uint32_t>("--sequences", raw.sequences, 1, kMaxSequences));
  CKV_ASSIGN_OR_RETURN(options.workers,
                       ParseNumber<uint32_t>("--workers", raw.workers, 1, kMaxProcesses));
  CKV_ASSIGN_OR_RETURN(options.seed, ParseNumber<uint64_t>("--seed", raw.seed, 0, UINT64_MAX));
  if (!absl::SimpleAtod(raw.audit_rate, &options.audit_rate) ||
      !(options.audit_rate >= 0 && options.audit_rate <= 1)) {
    return Disallowed("--audit-rate", raw.audit_rate, "0 to 1");
  }
  if (!raw.steps.empty()) {
    CKV_ASSIGN_OR_RETURN(options.steps, ParseNumber<uint32_t>("--steps", raw.steps, 1, UINT32_MAX));
  }
  CKV_ASSIGN_OR_RETURN(options.repeat,
                       ParseNumber<uint32_t>("--repeat", raw.repeat, 0, UINT32_MAX));
  if (options.repeat != 1 && options.format == Format::kJson) {
    return absl::InvalidArgumentError("--repeat goes with --format table: json is one object");
  }
  if (!raw.worker_index.empty()) {
    CKV_ASSIGN_OR_RETURN(
        options.worker_index,
        ParseNumber<uint32_t>("--worker-index", raw.worker_index, 0, kMaxProcesses));
    CKV_ASSIGN_OR_RETURN(options.result_fd,
                         ParseNumber<int>("--result-fd", raw.result_fd, 0, INT32_MAX));
    options.connect = raw.worker_address;
    CKV_ASSIGN_OR_RETURN(
        const uint32_t cache_tokens,
        ParseNumber<uint32_t>("--worker-cache-tokens", raw.worker_cache_tokens, 0, UINT32_MAX));
    // The dump is of the run's own size.
    if (std::exchange(options.method.cache_tokens, cache_tokens) != cache_tokens) {
      options.dump_outputs.clear();
    }
  }
  if (!options.dump_outputs.empty() && !options.Has(Method::kClusterkv)) {
    return absl::InvalidArgumentError(
        "--dump-outputs writes what clusterkv computes; --methods does not have it");
  }
  return absl::OkStatus();
}

void Declare(CLI::App& app, ReplayOptions& options, RawOptions& raw) {
  app.add_option("TRACE", options.trace, "KV trace (safetensors, clusterkv-trace/1)")->required();
  app.add_option("--methods", raw.methods, "of clusterkv,quest,window,oracle")
      ->capture_default_str();
  app.add_option("--budgets", raw.budgets, "clustered tokens attended per KV head and step")
      ->capture_default_str();
  app.add_option("--preset", options.preset,
                 "parameters of the method: " + absl::StrJoin(gpu::MethodPresetNames(), ", "))
      ->default_val("default");
  app.add_option("--set", raw.settings, "KEY=VALUE: one parameter of the preset; repeatable")
      ->allow_extra_args(false);
  app.add_option("--cache-tokens", raw.cache_tokens,
                 "cluster cache per layer and KV head; 0 = 4 x budget + the largest cluster; of "
                 "further sizes, as 0,8192,16384, the hit rates are measured");
  app.add_option("--mode", raw.mode, "who fetches: direct (this process) or served (the daemon)")
      ->capture_default_str();
  app.add_option("--backend", options.backend, "of the private daemon: host, cuda or auto")
      ->default_val("auto");
  app.add_option("--connect", options.connect,
                 "unix:PATH or HOST:PORT of a running daemon, instead of a private one")
      ->envname("CLUSTERKV_ADDRESS");
  app.add_option("--sequences", raw.sequences, "decoded together by each worker")
      ->capture_default_str();
  app.add_option("--workers", raw.workers, "processes at the same time")->capture_default_str();
  app.add_option("--steps", raw.steps, "decode only the first N steps");
  app.add_option("--audit-rate", raw.audit_rate,
                 "share of direct steps that the daemon compares with exact attention, for its "
                 "metrics; 0 to 1")
      ->capture_default_str();
  app.add_option("--seed", raw.seed, "of k-means; sequence i has seed + i")->capture_default_str();
  app.add_option("--repeat", raw.repeat, "replay so often, as a load; 0: until it is stopped")
      ->capture_default_str();
  app.add_option("--dump-outputs", options.dump_outputs,
                 "write clusterkv's outputs and selections at the first budget to this file");
  app.add_option("--html", options.html,
                 "write a report with charts to this file, complete in itself");
  app.add_option("--format", raw.format, "table or json")->capture_default_str();
  app.add_option("--publish", raw.publish,
                 "sync: wait for every segment, so that runs repeat exactly; async: do not")
      ->capture_default_str();
  // Not for people: how the replay starts itself again.
  app.add_option("--worker-index", raw.worker_index)->group("");
  app.add_option("--worker-address", raw.worker_address)->group("");
  app.add_option("--worker-cache-tokens", raw.worker_cache_tokens)->group("");
  app.add_option("--result-fd", raw.result_fd)->group("");
  app.set_version_flag("--version", CLUSTERKV_VERSION);
}

}  // namespace

const char* MethodName(Method method) {
  switch (method) {
    case Method::kClusterkv:
      return "clusterkv";
    case Method::kQuest:
      return "quest";
    case Method::kWindow:
      return "window";
    case Method::kOracle:
      return "oracle";
  }
  return "unknown";
}

const char* ModeName(FetchMode mode) { return mode == FetchMode::kDirect ? "direct" : "served"; }

bool ReplayOptions::Has(Method wanted) const {
  return std::find(methods.begin(), methods.end(), wanted) != methods.end();
}

absl::StatusOr<std::optional<ReplayOptions>> ParseOptions(int argc, const char* const* argv) {
  ReplayOptions options;
  RawOptions raw;
  CLI::App app(
      "Replays a model's KV trace as a worker of clusterkvd and measures what it computes.",
      "clusterkv-replay");
  Declare(app, options, raw);
  // CLI11 reports by exceptions; they end here.
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& asked) {
    app.exit(asked);
    return std::nullopt;
  } catch (const CLI::ParseError& error) {
    return absl::InvalidArgumentError(error.what());
  }
  CKV_RETURN_IF_ERROR(ParseLists(raw, options));
  CKV_RETURN_IF_ERROR(ParseMethod(raw, options));
  CKV_RETURN_IF_ERROR(ParseRest(raw, options));
  return options;
}

absl::Status CheckAgainstTrace(const Trace& trace, ReplayOptions& options) {
  if (options.steps == 0) options.steps = trace.steps();
  if (options.steps > trace.steps()) {
    return Disallowed("--steps", absl::StrCat(options.steps),
                      absl::StrCat("1 to ", trace.steps(), ", the trace's decode tokens"));
  }
  if (options.worker_index) return absl::OkStatus();  // its parent has looked at the rest
  for (const uint32_t budget : options.budgets) {
    const absl::Status status = MethodForBudget(options, trace, budget).Validate();
    if (!status.ok()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "--preset, --set or --cache-tokens, at budget ", budget, ": ", status.message()));
    }
  }
  const uint32_t smallest = *std::min_element(options.budgets.begin(), options.budgets.end());
  for (const uint32_t size : options.cache_sweep) {
    ReplayOptions sized = options;
    sized.method.cache_tokens = size;
    const absl::Status status = MethodForBudget(sized, trace, smallest).Validate();
    if (!status.ok()) {
      return absl::InvalidArgumentError(absl::StrCat("--cache-tokens: ", status.message(),
                                                     ", at the smallest budget, ", smallest));
    }
  }
  return absl::OkStatus();
}

gpu::MethodOptions MethodForBudget(const ReplayOptions& options, const Trace& trace,
                                   uint32_t budget) {
  gpu::MethodOptions method = options.method;
  method.budget_tokens = budget;
  method.softmax_scale = trace.softmax_scale();
  method.seed = options.seed;
  return method;
}

}  // namespace clusterkv::client::replay
