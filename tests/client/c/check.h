// Checks that end the test program.
#pragma once

#include <stdio.h>
#include <stdlib.h>

#include "client/c/clusterkv.h"

#define CHECK(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      fprintf(stderr, "%s:%d: %s; last error: %s\n", __FILE__, __LINE__, #condition, \
              clusterkv_last_error());                                               \
      exit(1);                                                                       \
    }                                                                                \
  } while (0)

#define CHECK_STATUS(expected, call)                                                          \
  do {                                                                                        \
    const clusterkv_status status_ = (call);                                                  \
    if (status_ != (expected)) {                                                              \
      fprintf(stderr, "%s:%d: %s is %s, not %s; last error: %s\n", __FILE__, __LINE__, #call, \
              clusterkv_status_name(status_), clusterkv_status_name(expected),                \
              clusterkv_last_error());                                                        \
      exit(1);                                                                                \
    }                                                                                         \
  } while (0)

#define CHECK_OK(call) CHECK_STATUS(CLUSTERKV_OK, call)
