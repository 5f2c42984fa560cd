#include "client/c/method.h"

#include <limits>

#include "absl/strings/str_cat.h"
#include "client/c/arguments.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::c {
namespace {

using gpu::GroupRule;
using gpu::MethodOptions;

static_assert(CLUSTERKV_GROUP_SOFTMAX == static_cast<uint32_t>(GroupRule::kSoftmax));
static_assert(CLUSTERKV_GROUP_MEAN == static_cast<uint32_t>(GroupRule::kMean));
static_assert(CLUSTERKV_GROUP_MAX == static_cast<uint32_t>(GroupRule::kMax));

struct Number {
  uint32_t clusterkv_method_options::*given;
  uint32_t MethodOptions::*member;
};

constexpr Number kNumbers[] = {
    {&clusterkv_method_options::sink_tokens, &MethodOptions::sink_tokens},
    {&clusterkv_method_options::min_window_tokens, &MethodOptions::min_window_tokens},
    {&clusterkv_method_options::decode_segment_tokens, &MethodOptions::decode_segment_tokens},
    {&clusterkv_method_options::prompt_segment_tokens, &MethodOptions::prompt_segment_tokens},
    {&clusterkv_method_options::tokens_per_cluster, &MethodOptions::tokens_per_cluster},
    {&clusterkv_method_options::kmeans_iterations, &MethodOptions::kmeans_iterations},
    {&clusterkv_method_options::window_lag_segments, &MethodOptions::window_lag_segments},
    {&clusterkv_method_options::budget_tokens, &MethodOptions::budget_tokens},
    {&clusterkv_method_options::cache_tokens, &MethodOptions::cache_tokens},
};

absl::Status ReadSwitch(const char* name, uint32_t given, bool* member) {
  if (given == CLUSTERKV_PRESET) return absl::OkStatus();
  CKV_RETURN_IF_ERROR(CheckSwitch(name, given));
  *member = given == 1;
  return absl::OkStatus();
}

absl::Status ReadScale(double given, float* member) {
  constexpr double kMost = std::numeric_limits<float>::max();
  constexpr double kLeast = std::numeric_limits<float>::min();
  if (given == 0 || (given >= kLeast && given <= kMost)) {
    *member = static_cast<float>(given);
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "softmax_scale is ", given, "; allowed: 0 (1 / sqrt(head_dim)) or ", kLeast, " to ", kMost));
}

}  // namespace

absl::StatusOr<MethodOptions> ReadMethod(const clusterkv_method_options* options) {
  if (options == nullptr) return gpu::MethodPreset("default");
  CKV_ASSIGN_OR_RETURN(const clusterkv_method_options given,
                       ReadStruct(options, CLUSTERKV_METHOD_OPTIONS_INIT));
  CKV_ASSIGN_OR_RETURN(MethodOptions method,
                       gpu::MethodPreset(given.preset != nullptr ? given.preset : "default"));
  for (const Number& number : kNumbers) {
    if (given.*number.given != CLUSTERKV_PRESET) method.*number.member = given.*number.given;
  }
  if (given.group != CLUSTERKV_PRESET) method.group = static_cast<GroupRule>(given.group);
  CKV_RETURN_IF_ERROR(ReadSwitch("center_keys", given.center_keys, &method.center_keys));
  CKV_RETURN_IF_ERROR(ReadSwitch("estimate", given.estimate, &method.estimate));
  CKV_RETURN_IF_ERROR(ReadScale(given.softmax_scale, &method.softmax_scale));
  method.seed = given.seed;
  return method;
}

clusterkv_method_options DescribeMethod(const MethodOptions& method) {
  clusterkv_method_options described = CLUSTERKV_METHOD_OPTIONS_INIT;
  described.preset = nullptr;
  for (const Number& number : kNumbers) described.*number.given = method.*number.member;
  described.group = static_cast<uint32_t>(method.group);
  described.center_keys = method.center_keys ? 1 : 0;
  described.estimate = method.estimate ? 1 : 0;
  described.softmax_scale = method.softmax_scale;
  described.seed = method.seed;
  return described;
}

}  // namespace clusterkv::client::c
