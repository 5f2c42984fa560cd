// Early return on errors; absl of this generation ships no such macros.
#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define CKV_RETURN_IF_ERROR(expression)        \
  do {                                         \
    ::absl::Status ckv_status_ = (expression); \
    if (!ckv_status_.ok()) return ckv_status_; \
  } while (false)

#define CKV_CONCAT_INNER_(a, b) a##b
#define CKV_CONCAT_(a, b) CKV_CONCAT_INNER_(a, b)

#define CKV_ASSIGN_OR_RETURN(declaration, expression) \
  CKV_ASSIGN_OR_RETURN_IMPL_(CKV_CONCAT_(ckv_statusor_, __LINE__), declaration, expression)

// NOLINTBEGIN(bugprone-macro-parentheses): a declaration in parentheses is none.
#define CKV_ASSIGN_OR_RETURN_IMPL_(statusor, declaration, expression) \
  auto statusor = (expression);                                       \
  if (!statusor.ok()) return std::move(statusor).status();            \
  declaration = *std::move(statusor)
// NOLINTEND(bugprone-macro-parentheses)
