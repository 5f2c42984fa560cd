// Small KV traces of random values, written as files for the tests.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "client/replay/trace.h"
#include "gpu/dtype.h"

namespace clusterkv::client::replay {

struct RandomTraceOptions {
  uint32_t prompt_tokens = 150;
  uint32_t steps = 40;
  std::vector<uint32_t> layers = {3, 7};
  uint32_t kv_heads = 2;
  uint32_t q_heads = 4;
  uint32_t head_dim = 64;
  gpu::DType dtype = gpu::DType::kFp32;
  float spread = 1.0f;  // of queries: the larger, the sharper the attention
  float key_spread = 1.0f;
  uint32_t seed = 1;
};

// A directory that is gone with its owner.
class TemporaryDirectory {
 public:
  TemporaryDirectory();
  ~TemporaryDirectory();
  std::string Path(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

// Writes the trace to `path`; `changes` replace entries of its metadata ("" removes one).
void WriteRandomTrace(const std::string& path, const RandomTraceOptions& options,
                      const std::map<std::string, std::string>& changes = {});

// Writes and opens it; fails the test if that does not work.
Trace MakeRandomTrace(const TemporaryDirectory& directory, const RandomTraceOptions& options);

}  // namespace clusterkv::client::replay
