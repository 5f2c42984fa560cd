// The command line of clusterkv-bench.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "gpu/method_options.h"
#include "gpu/shape.h"

namespace clusterkv::client::bench {

enum class Format { kText, kJson };

// The contract's operations, in the order in which they run: ceilings first.
const std::vector<std::string>& OperationNames();

struct KmeansSize {
  uint32_t problems = 0;
  uint32_t tokens = 0;
  uint32_t clusters = 0;
  bool operator==(const KmeansSize&) const = default;
};

struct BenchOptions {
  std::vector<std::string> operations;  // distinct, in OperationNames' order
  std::vector<uint32_t> contexts;       // tokens
  std::vector<uint32_t> batches;        // sequences
  std::vector<uint32_t> budgets;        // tokens
  std::vector<uint32_t> misses;         // percent of the selected clusters
  std::vector<uint32_t> decode_misses;  // the same, of decode
  std::vector<KmeansSize> kmeans;       // empty: the backend's own
  gpu::Shape shape;
  std::string preset;
  gpu::MethodOptions method;  // the preset; the budget is set for each run
  std::string backend;
  uint64_t host_memory = 0;   // bytes of a node's host store; bounds decode's batch
  uint64_t store_memory = 0;  // bytes that the bench itself pins, shared by layers and sequences
  uint32_t repeats = 0;
  uint64_t seed = 0;
  Format format = Format::kText;

  bool Has(const std::string& operation) const;
};

// nullopt: the help or the version was asked for and printed.
// Errors: INVALID_ARGUMENT naming the option and what is allowed.
absl::StatusOr<std::optional<BenchOptions>> ParseOptions(int argc, const char* const* argv);

}  // namespace clusterkv::client::bench
