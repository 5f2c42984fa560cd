// What the handles of the C interface point to.
#pragma once

#include <memory>
#include <vector>

#include "client/c/clusterkv.h"
#include "client/client.h"

struct clusterkv_client {
  std::unique_ptr<clusterkv::client::Client> client;
};

struct clusterkv_sequence {
  // Shared with batches: C's types keep nobody from destroying a sequence before its batch.
  std::shared_ptr<clusterkv::client::Sequence> sequence;
};

struct clusterkv_batch {
  std::vector<std::shared_ptr<clusterkv::client::Sequence>> sequences;
  std::unique_ptr<clusterkv::client::DecodeBatch> batch;  // goes before its sequences

  const clusterkv::gpu::Shape& shape() const { return sequences.front()->options().shape; }
};
