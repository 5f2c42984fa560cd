#include "client/bench/options.h"

#include <algorithm>
#include <charconv>
#include <utility>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "gpu/dtype.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::bench {
namespace {

constexpr uint64_t kMaxTokens = 1u << 24;
constexpr uint64_t kMaxBatch = 512;
constexpr uint64_t kMaxBudget = 1'048'576;
constexpr uint64_t kMaxProblems = 4096;
constexpr uint64_t kMaxRepeats = 100'000;
constexpr uint64_t kMaxBytes = 1ull << 46;
constexpr uint64_t kLeastStoreBytes = 16ull << 20;

// As typed, before it means anything.
struct RawOptions {
  std::string operations = absl::StrJoin(OperationNames(), ",");
  std::string contexts = "8k,32k,128k", batches = "1,4,16", budgets = "1024,2048";
  std::string misses = "0,5,10,20", decode_misses = "5,10,20,40", kmeans;
  std::string layers = "32", kv_heads = "8", q_heads = "32", head_dim = "128", dtype = "bf16";
  std::string host_memory = "96gb", store_memory = "8gb";
  std::string repeats = "100", seed = "0", format = "text";
};

absl::Status Disallowed(const std::string& option, const std::string& value,
                        const std::string& allowed) {
  return absl::InvalidArgumentError(
      absl::StrCat(option, " is \"", value, "\"; allowed: ", allowed));
}

struct Unit {
  const char* suffix;
  uint64_t factor;
};

// A whole number, perhaps with one of `units` behind it.
absl::StatusOr<uint64_t> ParseNumber(const std::string& option, const std::string& text,
                                     uint64_t least, uint64_t most,
                                     const std::vector<Unit>& units = {}) {
  uint64_t value = 0, factor = 1;
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  bool valid = error == std::errc();
  if (valid && stop != end) {
    const std::string suffix(stop, end);
    const auto unit =
        std::ranges::find_if(units, [&](const Unit& known) { return suffix == known.suffix; });
    valid = unit != units.end();
    if (valid) factor = unit->factor;
  }
  uint64_t scaled = 0;
  if (valid && !__builtin_mul_overflow(value, factor, &scaled) && scaled >= least &&
      scaled <= most) {
    return scaled;
  }
  std::string allowed = absl::StrCat(least, " to ", most);
  for (const Unit& unit : units) absl::StrAppend(&allowed, ", or with ", unit.suffix);
  return Disallowed(option, text, allowed);
}

const std::vector<Unit>& TokenUnits() {
  static const auto* const units = new std::vector<Unit>{{"k", 1024}};
  return *units;
}

const std::vector<Unit>& ByteUnits() {
  static const auto* const units = new std::vector<Unit>{{"mb", 1ull << 20}, {"gb", 1ull << 30}};
  return *units;
}

std::vector<std::string> Split(const std::string& text, char separator) {
  return absl::StrSplit(text, separator);
}

absl::StatusOr<std::vector<uint32_t>> ParseList(const std::string& option, const std::string& text,
                                                uint64_t least, uint64_t most,
                                                const std::vector<Unit>& units = {}) {
  std::vector<uint32_t> list;
  for (const std::string& part : Split(text, ',')) {
    CKV_ASSIGN_OR_RETURN(const uint64_t value, ParseNumber(option, part, least, most, units));
    const auto narrow = static_cast<uint32_t>(value);
    if (std::ranges::find(list, narrow) == list.end()) list.push_back(narrow);
  }
  return list;
}

absl::Status ParseOperations(const RawOptions& raw, BenchOptions& options) {
  const std::vector<std::string> wanted = Split(raw.operations, ',');
  for (const std::string& name : wanted) {
    if (std::ranges::find(OperationNames(), name) == OperationNames().end()) {
      return Disallowed("--ops", name, absl::StrJoin(OperationNames(), ", "));
    }
  }
  for (const std::string& name : OperationNames()) {
    if (std::ranges::find(wanted, name) != wanted.end()) options.operations.push_back(name);
  }
  return absl::OkStatus();
}

absl::Status ParseKmeans(const RawOptions& raw, BenchOptions& options) {
  if (raw.kmeans.empty()) return absl::OkStatus();
  for (const std::string& part : Split(raw.kmeans, ',')) {
    const std::vector<std::string> numbers = Split(part, 'x');
    if (numbers.size() != 3) {
      return Disallowed("--kmeans", part, "PROBLEMSxTOKENSxCLUSTERS, as 8x8192x256");
    }
    KmeansSize size;
    CKV_ASSIGN_OR_RETURN(const uint64_t problems,
                         ParseNumber("--kmeans", numbers[0], 1, kMaxProblems));
    CKV_ASSIGN_OR_RETURN(const uint64_t tokens,
                         ParseNumber("--kmeans", numbers[1], 1, 65'536, TokenUnits()));
    CKV_ASSIGN_OR_RETURN(const uint64_t clusters, ParseNumber("--kmeans", numbers[2], 1, tokens));
    size.problems = static_cast<uint32_t>(problems);
    size.tokens = static_cast<uint32_t>(tokens);
    size.clusters = static_cast<uint32_t>(clusters);
    options.kmeans.push_back(size);
  }
  return absl::OkStatus();
}

absl::Status ParseShape(const RawOptions& raw, BenchOptions& options) {
  const auto number = [](const char* option, const std::string& text, uint32_t& value) {
    const absl::StatusOr<uint64_t> parsed = ParseNumber(option, text, 1, 16'384);
    if (parsed.ok()) value = static_cast<uint32_t>(*parsed);
    return parsed.status();
  };
  CKV_RETURN_IF_ERROR(number("--layers", raw.layers, options.shape.layers));
  CKV_RETURN_IF_ERROR(number("--kv-heads", raw.kv_heads, options.shape.kv_heads));
  CKV_RETURN_IF_ERROR(number("--q-heads", raw.q_heads, options.shape.q_heads));
  CKV_RETURN_IF_ERROR(number("--head-dim", raw.head_dim, options.shape.head_dim));
  const absl::StatusOr<gpu::DType> dtype = gpu::ParseDType(raw.dtype);
  if (!dtype.ok()) return Disallowed("--dtype", raw.dtype, "bf16, fp16, fp32");
  options.shape.dtype = *dtype;
  return options.shape.Validate();
}

absl::Status ParseRest(const RawOptions& raw, BenchOptions& options) {
  absl::StatusOr<gpu::MethodOptions> preset = gpu::MethodPreset(options.preset);
  if (!preset.ok()) {
    return absl::InvalidArgumentError(absl::StrCat("--", preset.status().message()));
  }
  options.method = *preset;
  if (options.backend != "auto" && options.backend != "host" && options.backend != "cuda") {
    return Disallowed("--backend", options.backend, "auto, host, cuda");
  }
  CKV_ASSIGN_OR_RETURN(options.host_memory,
                       ParseNumber("--host-memory", raw.host_memory, 1, kMaxBytes, ByteUnits()));
  CKV_ASSIGN_OR_RETURN(options.store_memory,
                       ParseNumber("--store-memory", raw.store_memory, kLeastStoreBytes,
                                   uint64_t{64} << 30, ByteUnits()));
  CKV_ASSIGN_OR_RETURN(const uint64_t repeats,
                       ParseNumber("--repeats", raw.repeats, 1, kMaxRepeats));
  options.repeats = static_cast<uint32_t>(repeats);
  CKV_ASSIGN_OR_RETURN(options.seed, ParseNumber("--seed", raw.seed, 0, UINT64_MAX));
  if (raw.format != "text" && raw.format != "json") {
    return Disallowed("--format", raw.format, "text, json");
  }
  options.format = raw.format == "json" ? Format::kJson : Format::kText;
  return absl::OkStatus();
}

absl::Status ParseLists(const RawOptions& raw, BenchOptions& options) {
  // Below 1,024 tokens sinks and window are most of a context.
  CKV_ASSIGN_OR_RETURN(options.contexts,
                       ParseList("--contexts", raw.contexts, 1024, kMaxTokens, TokenUnits()));
  CKV_ASSIGN_OR_RETURN(options.batches, ParseList("--batches", raw.batches, 1, kMaxBatch));
  CKV_ASSIGN_OR_RETURN(options.budgets,
                       ParseList("--budgets", raw.budgets, 1, kMaxBudget, TokenUnits()));
  CKV_ASSIGN_OR_RETURN(options.misses, ParseList("--misses", raw.misses, 0, 100));
  CKV_ASSIGN_OR_RETURN(options.decode_misses,
                       ParseList("--decode-misses", raw.decode_misses, 0, 100));
  return absl::OkStatus();
}

void Declare(CLI::App& app, BenchOptions& options, RawOptions& raw) {
  app.add_option("--ops", raw.operations, "of " + absl::StrJoin(OperationNames(), ", "));
  app.add_option("--contexts", raw.contexts, "tokens of each sequence, as 32k")
      ->capture_default_str();
  app.add_option("--batches", raw.batches, "sequences that decode together")->capture_default_str();
  app.add_option("--budgets", raw.budgets, "clustered tokens attended per KV head and step")
      ->capture_default_str();
  app.add_option("--misses", raw.misses, "percent of the selected clusters that are not cached")
      ->capture_default_str();
  app.add_option("--decode-misses", raw.decode_misses, "the same, of decode")
      ->capture_default_str();
  app.add_option("--kmeans", raw.kmeans, "PROBLEMSxTOKENSxCLUSTERS, instead of the usual sizes");
  app.add_option("--layers", raw.layers)->capture_default_str();
  app.add_option("--kv-heads", raw.kv_heads)->capture_default_str();
  app.add_option("--q-heads", raw.q_heads)->capture_default_str();
  app.add_option("--head-dim", raw.head_dim)->capture_default_str();
  app.add_option("--dtype", raw.dtype, "bf16, fp16 or (host) fp32")->capture_default_str();
  app.add_option("--preset", options.preset,
                 "parameters of the method: " + absl::StrJoin(gpu::MethodPresetNames(), ", "))
      ->default_val("default");
  app.add_option("--backend", options.backend, "host, cuda or auto")->default_val("auto");
  app.add_option("--host-memory", raw.host_memory,
                 "host store of the node that decode is about: bounds its batch")
      ->capture_default_str();
  app.add_option("--store-memory", raw.store_memory,
                 "host store that is pinned here; layers and sequences share it")
      ->capture_default_str();
  app.add_option("--repeats", raw.repeats, "samples of each time")->capture_default_str();
  app.add_option("--seed", raw.seed)->capture_default_str();
  app.add_option("--format", raw.format, "text or json")->capture_default_str();
  app.set_version_flag("--version", CLUSTERKV_VERSION);
}

}  // namespace

const std::vector<std::string>& OperationNames() {
  static const auto* const names = new std::vector<std::string>{
      "hbm-copy", "h2d",   "d2h",    "gather", "kmeans", "permute-offload",
      "select",   "fetch", "attend", "step",   "decode", "served"};
  return *names;
}

bool BenchOptions::Has(const std::string& operation) const {
  return std::ranges::find(operations, operation) != operations.end();
}

absl::StatusOr<std::optional<BenchOptions>> ParseOptions(int argc, const char* const* argv) {
  BenchOptions options;
  RawOptions raw;
  CLI::App app("Measures the operations of clusterkv against what the machine can do.",
               "clusterkv-bench");
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
  CKV_RETURN_IF_ERROR(ParseOperations(raw, options));
  CKV_RETURN_IF_ERROR(ParseLists(raw, options));
  CKV_RETURN_IF_ERROR(ParseKmeans(raw, options));
  CKV_RETURN_IF_ERROR(ParseShape(raw, options));
  CKV_RETURN_IF_ERROR(ParseRest(raw, options));
  for (const uint32_t budget : options.budgets) {
    gpu::MethodOptions method = options.method;
    method.budget_tokens = budget;
    CKV_RETURN_IF_ERROR(method.Validate());
  }
  return options;
}

}  // namespace clusterkv::client::bench
