#include "tests/gpu/test_sequence.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "tests/gpu/half_format.h"

namespace clusterkv::gpu {

double StoredValue(DType dtype, const std::byte* bytes) {
  if (dtype == DType::kFp32) {
    float value;
    std::memcpy(&value, bytes, sizeof(value));
    return value;
  }
  uint16_t half;
  std::memcpy(&half, bytes, sizeof(half));
  return HalfFormat(dtype).Decode(half);
}

void StoreValue(DType dtype, double value, std::byte* bytes) {
  if (dtype == DType::kFp32) {
    const auto single = static_cast<float>(value);
    std::memcpy(bytes, &single, sizeof(single));
    return;
  }
  const uint16_t half = HalfFormat(dtype).Encode(value);
  std::memcpy(bytes, &half, sizeof(half));
}

TestBuffer::TestBuffer(Device& device, Stream& stream, size_t bytes) : stream_(stream) {
  auto memory = device.Allocate(std::max<size_t>(bytes, 1));
  EXPECT_TRUE(memory.ok()) << memory.status();
  memory_ = *std::move(memory);
}

void TestBuffer::Upload(const void* source, size_t bytes) {
  ASSERT_LE(bytes, memory_->bytes());
  ASSERT_TRUE(stream_.CopyAsync(memory_->data(), source, bytes).ok());
  ASSERT_TRUE(stream_.Synchronize().ok());
}

void TestBuffer::DownloadBytes(void* destination, size_t offset, size_t bytes) const {
  ASSERT_LE(offset + bytes, memory_->bytes());
  ASSERT_TRUE(stream_.CopyAsync(destination, memory_->data() + offset, bytes).ok());
  ASSERT_TRUE(stream_.Synchronize().ok());
}

std::unique_ptr<DeviceMemory> PinnedChunkTable(Device& device, size_t chunks) {
  auto table = device.AllocatePinned(chunks * sizeof(const std::byte*));
  EXPECT_TRUE(table.ok()) << table.status();
  return *std::move(table);
}

TestSequence::TestSequence(Device& device, Stream& stream, const Scenario& scenario,
                           uint32_t generation)
    : device_(device),
      stream_(stream),
      scenario_(scenario),
      generation_(generation),
      random_(scenario.seed),
      layout_(*StateLayout::Create(scenario.shape, scenario.method.Resolved(scenario.shape),
                                   scenario.max_tokens)),
      plan_(scenario.method),
      clusters_(scenario.shape.problems()) {
  scenario_.method = scenario.method.Resolved(scenario.shape);
  state_ = std::make_unique<TestBuffer>(device, stream, layout_.total_bytes);
  const size_t element = SizeOf(shape().dtype);
  host_tokens_.resize(scenario.max_tokens * shape().token_bytes());
  std::normal_distribution<double> normal;
  for (size_t i = 0; i < host_tokens_.size(); i += element) {
    StoreValue(shape().dtype, normal(random_), &host_tokens_[i]);
  }
  tokens_ = std::make_unique<TestBuffer>(device, stream, host_tokens_.size());
  tokens_->Upload(host_tokens_.data(), host_tokens_.size());
  EXPECT_TRUE(device.cluster_ops().Initialize(stream, state_->data(), layout_, generation).ok());
  chunk_addresses_ = PinnedChunkTable(device, layout_.max_segments);
}

BatchSlot TestSequence::slot() const {
  return {.state = state_->data(),
          .layout = &layout_,
          .host_chunks = reinterpret_cast<const std::byte* const*>(chunk_addresses_->data()),
          // Some are looked up where they are needed.
          .chunk_count = static_cast<uint32_t>(chunks_.size() / 2),
          .generation = generation_,
          .active = 1};
}

size_t TestSequence::token_offset(uint32_t layer, bool v, uint32_t position,
                                  uint32_t kv_head) const {
  const size_t plane = size_t{layer} * 2 + (v ? 1 : 0);
  const size_t row = (plane * scenario_.max_tokens + position) * shape().kv_heads + kv_head;
  return row * shape().row_bytes() / 2;
}

std::vector<double> TestSequence::Row(uint32_t layer, bool v, uint32_t position,
                                      uint32_t kv_head) const {
  const std::byte* const bytes = token_bytes(layer, v, position, kv_head);
  std::vector<double> row(shape().head_dim);
  for (size_t i = 0; i < row.size(); ++i) {
    row[i] = StoredValue(shape().dtype, bytes + i * SizeOf(shape().dtype));
  }
  return row;
}

WriteTokensArgs TestSequence::WriteArgs(uint32_t position, uint32_t count) const {
  WriteTokensArgs args;
  args.slot = slot();
  args.layer_count = shape().layers;
  args.position = position;
  args.count = count;
  args.source = {.k = tokens() + token_offset(0, false, position, 0),
                 .v = tokens() + token_offset(0, true, position, 0),
                 .layer_stride = token_offset(1, false, 0, 0),
                 .token_stride = token_offset(0, false, 1, 0),
                 .head_stride = token_offset(0, false, 0, 1)};
  args.length_after = position + count;
  return args;
}

void TestSequence::IngestPrompt(uint32_t count) {
  prompt = count;
  while (length < count) {
    const auto piece = std::min(count - length, 1 + static_cast<uint32_t>(random_() % 150));
    ASSERT_TRUE(device_.decode_ops().WriteTokens(stream_, WriteArgs(length, piece)).ok());
    length += piece;
  }
  ASSERT_TRUE(stream_.Synchronize().ok());
}

void TestSequence::PublishComplete() {
  while (const auto segment = plan_.Next(length, prompt)) Publish(*segment);
}

struct TestSequence::HeadRun {
  uint32_t cluster_begin, cluster_count;
  std::unique_ptr<TestBuffer> order, sizes, centroids, value_means, workspace;
  size_t rows_offset, positions_offset;  // bytes within the chunk
};

TestSequence::HeadRun TestSequence::ClusterAtRandom(uint32_t layer, uint32_t kv_head,
                                                    const Segment& segment) {
  const uint32_t k = ClustersOfSegment(method(), segment.tokens());
  std::vector<std::vector<uint32_t>> members(k);
  for (uint32_t position = segment.begin; position < segment.end; ++position) {
    size_t label = random_() % (1 + random_() % k);  // uneven sizes
    while (members[label].size() >= method().largest_cluster_tokens()) label = (label + 1) % k;
    members[label].push_back(position);
  }
  std::erase_if(members, [](const auto& positions) { return positions.empty(); });

  std::vector<ModelCluster>& model = clusters_[layout_.head_index(layer, kv_head)];
  HeadRun run = {};
  run.cluster_begin = static_cast<uint32_t>(model.size());
  run.cluster_count = static_cast<uint32_t>(members.size());
  std::vector<uint32_t> order, sizes;
  const size_t element = SizeOf(shape().dtype);
  std::vector<std::byte> means[2];
  for (const std::vector<uint32_t>& positions : members) {
    sizes.push_back(static_cast<uint32_t>(positions.size()));
    ModelCluster cluster = {.positions = positions, .centroid = {}, .value_mean = {}};
    for (uint32_t position : positions) order.push_back(position - segment.begin);
    for (bool v : {false, true}) {
      std::vector<double>& mean = v ? cluster.value_mean : cluster.centroid;
      mean.assign(shape().head_dim, 0.0);
      for (uint32_t position : positions) {
        const std::vector<double> row = Row(layer, v, position, kv_head);
        for (size_t i = 0; i < mean.size(); ++i) {
          mean[i] += row[i] / static_cast<double>(positions.size());
        }
      }
      for (double& value : mean) {
        std::byte stored[4];
        StoreValue(shape().dtype, value, stored);
        value = StoredValue(shape().dtype, stored);
        means[v].insert(means[v].end(), stored, stored + element);
      }
    }
    model.push_back(std::move(cluster));
  }
  const auto upload = [&](const void* data, size_t bytes) {
    auto buffer = std::make_unique<TestBuffer>(device_, stream_, bytes);
    buffer->Upload(data, bytes);
    return buffer;
  };
  run.order = upload(order.data(), order.size() * 4);
  run.sizes = upload(sizes.data(), sizes.size() * 4);
  run.centroids = upload(means[0].data(), means[0].size());
  run.value_means = upload(means[1].data(), means[1].size());
  run.workspace =
      std::make_unique<TestBuffer>(device_, stream_, segment.tokens() * shape().row_bytes());
  return run;
}

void TestSequence::Publish(const Segment& segment) {
  const auto chunk = static_cast<uint32_t>(chunks_.size());
  const size_t run_bytes = segment.tokens() * shape().row_bytes();
  std::vector<HeadRun> runs;
  size_t end = 16;
  for (uint32_t layer = 0; layer < shape().layers; ++layer) {
    for (uint32_t kv_head = 0; kv_head < shape().kv_heads; ++kv_head) {
      HeadRun& run = runs.emplace_back(ClusterAtRandom(layer, kv_head, segment));
      run.rows_offset = end;
      run.positions_offset = end + run_bytes;
      end += run_bytes + (segment.tokens() * 4 + 15) / 16 * 16 + 48;
    }
  }
  chunks_.push_back(std::make_unique<TestBuffer>(device_, stream_, end));
  reinterpret_cast<const std::byte**>(chunk_addresses_->data())[chunk] = chunks_.back()->data();

  StageArgs stage = {.range = tokens(),
                     .range_tokens = scenario_.max_tokens,
                     .first_token = segment.begin,
                     .count = segment.tokens(),
                     .layer_count = shape().layers,
                     .kv_heads = shape().kv_heads,
                     .head_dim = shape().head_dim,
                     .dtype = shape().dtype,
                     .destinations = {}};
  PermuteArgs permute = {.row_bytes = shape().row_bytes(), .problems = {}};
  PublishArgs publish = {.state = state_->data(),
                         .layout = &layout_,
                         .segment = chunk,
                         .segment_begin = segment.begin,
                         .segment_end = segment.end,
                         .problems = {}};
  std::byte* const base = chunks_.back()->data();
  for (const HeadRun& run : runs) {
    stage.destinations.push_back(base + run.rows_offset);
    permute.problems.push_back(
        {.rows = base + run.rows_offset,
         .destination = base + run.rows_offset,
         .workspace = run.workspace->data(),
         .order = reinterpret_cast<const uint32_t*>(run.order->data()),
         .tokens = segment.tokens(),
         .first_position = segment.begin,
         .positions = reinterpret_cast<uint32_t*>(base + run.positions_offset)});
    publish.problems.push_back(
        {.cluster_begin = run.cluster_begin,
         .cluster_count = run.cluster_count,
         .sizes = reinterpret_cast<const uint32_t*>(run.sizes->data()),
         .centroids = run.centroids->data(),
         .value_means = run.value_means->data(),
         .chunk = chunk,
         .rows_offset = static_cast<uint32_t>(run.rows_offset / 16),
         .positions_offset = static_cast<uint32_t>(run.positions_offset / 16)});
  }
  ASSERT_TRUE(device_.cluster_ops().Stage(stream_, std::move(stage)).ok());
  ASSERT_TRUE(device_.cluster_ops().Permute(stream_, std::move(permute)).ok());
  ASSERT_TRUE(device_.cluster_ops().Publish(stream_, std::move(publish)).ok());
  ASSERT_TRUE(stream_.Synchronize().ok());
  plan_.Advance(segment);
  // The positions beside the rows are cluster by cluster, too.
  for (size_t head = 0; head < runs.size(); ++head) {
    const auto positions =
        chunks_.back()->Download<uint32_t>(runs[head].positions_offset, segment.tokens());
    std::vector<uint32_t> expected;
    for (uint32_t c = 0; c < runs[head].cluster_count; ++c) {
      const auto& members = clusters_[head][runs[head].cluster_begin + c].positions;
      expected.insert(expected.end(), members.begin(), members.end());
    }
    ASSERT_EQ(positions, expected);
  }
}

}  // namespace clusterkv::gpu
