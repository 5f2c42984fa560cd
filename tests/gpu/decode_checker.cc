#include "tests/gpu/decode_checker.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <set>

namespace clusterkv::gpu {
namespace {

double Dot(const std::vector<double>& a, const std::vector<double>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

// Padding between heads and sequences, so that a wrong stride shows.
constexpr size_t kQueryPad = 16;
constexpr size_t kOutPad = 5;

}  // namespace

DecodeChecker::DecodeChecker(Device& device, Stream& stream, std::vector<TestSequence*> sequences,
                             uint64_t seed)
    : device_(device), stream_(stream), sequences_(std::move(sequences)), random_(seed) {
  for (TestSequence* sequence : sequences_) {
    models_.push_back({.cut = 0,
                       .step = 0,
                       .last_used = std::vector<std::map<uint32_t, uint32_t>>(shape().problems()),
                       .mean_scores = std::vector<std::vector<double>>(shape().problems()),
                       .counters = std::vector<LayerCounters>(shape().layers)});
    batch_.push_back(sequence->slot());
  }
  const size_t element = SizeOf(shape().dtype);
  query_source_.head_stride = (shape().head_dim + kQueryPad) * element;
  query_source_.batch_stride = shape().q_heads * query_source_.head_stride + kQueryPad * element;
  host_queries_.resize(sequences_.size() * query_source_.batch_stride);
  queries_ = std::make_unique<TestBuffer>(device, stream, host_queries_.size());
  query_source_.q = queries_->data();
  appended_ = std::make_unique<TestBuffer>(
      device, stream, sequences_.size() * shape().kv_heads * shape().row_bytes());
  target_.head_stride = shape().head_dim + kOutPad;
  target_.batch_stride = shape().q_heads * target_.head_stride + kOutPad;
  target_.lse_batch_stride = shape().q_heads + 3;
  out_ = std::make_unique<TestBuffer>(device, stream, sequences_.size() * target_.batch_stride * 4);
  lse_ = std::make_unique<TestBuffer>(device, stream,
                                      sequences_.size() * target_.lse_batch_stride * 4);
  reports_ = *device.AllocatePinned(sequences_.size() * sizeof(LayerReport));
  target_.out = reinterpret_cast<float*>(out_->data());
  target_.lse = reinterpret_cast<float*>(lse_->data());
  std::normal_distribution<double> normal(0.0, 2.0);
  base_queries_.resize(sequences_.size() * shape().q_heads * shape().head_dim);
  for (double& value : base_queries_) value = normal(random_);
}

void DecodeChecker::UploadStep(uint32_t layer) {
  std::normal_distribution<double> normal(0.0, 1.0);
  const size_t element = SizeOf(shape().dtype);
  const size_t half = shape().row_bytes() / 2;
  std::vector<std::byte> appended(sequences_.size() * shape().kv_heads * 2 * half);
  for (size_t i = 0; i < sequences_.size(); ++i) {
    for (size_t h = 0; h < shape().q_heads; ++h) {
      for (size_t d = 0; d < shape().head_dim; ++d) {
        const double base = base_queries_[(i * shape().q_heads + h) * shape().head_dim + d];
        StoreValue(shape().dtype, base + normal(random_),
                   &host_queries_[i * query_source_.batch_stride + h * query_source_.head_stride +
                                  d * element]);
      }
    }
    // [batch][K, V][kv_head][head_dim]
    const uint32_t position = sequences_[i]->length - 1;
    for (bool v : {false, true}) {
      std::copy_n(sequences_[i]->token_bytes(layer, v, position, 0), shape().kv_heads * half,
                  &appended[(i * 2 + (v ? 1 : 0)) * shape().kv_heads * half]);
    }
  }
  queries_->Upload(host_queries_.data(), host_queries_.size());
  appended_->Upload(appended.data(), appended.size());
}

std::vector<std::vector<double>> DecodeChecker::GroupQueries(size_t i, uint32_t kv_head) const {
  const size_t group = shape().group_size();
  const size_t element = SizeOf(shape().dtype);
  std::vector<std::vector<double>> queries(group, std::vector<double>(shape().head_dim));
  for (size_t g = 0; g < group; ++g) {
    const std::byte* const bytes =
        &host_queries_[i * query_source_.batch_stride +
                       (kv_head * group + g) * query_source_.head_stride];
    for (size_t d = 0; d < shape().head_dim; ++d) {
      queries[g][d] = StoredValue(shape().dtype, bytes + d * element);
    }
  }
  return queries;
}

std::vector<double> DecodeChecker::Scores(size_t i, uint32_t layer, uint32_t kv_head) const {
  const TestSequence& sequence = *sequences_[i];
  const auto& clusters = sequence.clusters(layer, kv_head);
  const double scale = sequence.method().softmax_scale;
  const auto queries = GroupQueries(i, kv_head);
  std::vector<double> scores(clusters.size(), sequence.method().group == GroupRule::kMax
                                                  ? -std::numeric_limits<double>::infinity()
                                                  : 0.0);
  for (const std::vector<double>& query : queries) {
    std::vector<double> own;
    own.reserve(clusters.size());
    for (const ModelCluster& cluster : clusters)
      own.push_back(Dot(query, cluster.centroid) * scale);
    double sum = 0.0;
    for (double score : own) sum += std::exp(score);
    for (size_t c = 0; c < own.size(); ++c) {
      switch (sequence.method().group) {
        case GroupRule::kSoftmax:
          scores[c] += std::exp(own[c]) / sum;
          break;
        case GroupRule::kMean:
          scores[c] += own[c] / static_cast<double>(queries.size());
          break;
        case GroupRule::kMax:
          scores[c] = std::max(scores[c], own[c]);
          break;
      }
    }
  }
  return scores;
}

DecodeChecker::Selection DecodeChecker::CheckSelection(size_t i, uint32_t layer, uint32_t kv_head,
                                                       uint32_t budget,
                                                       const std::vector<double>& scores) {
  TestSequence& sequence = *sequences_[i];
  const StateLayout& layout = sequence.layout();
  const auto& clusters = sequence.clusters(layer, kv_head);
  const auto count =
      sequence.state().Download<uint32_t>(layout.selected_count + 4 * kv_head, 1).front();
  Selection selection;
  EXPECT_LE(count, layout.budget_tokens);
  const size_t row = 4 * size_t{kv_head} * layout.budget_tokens;
  selection.cluster = sequence.state().Download<uint32_t>(layout.selected_cluster + row, count);
  selection.take = sequence.state().Download<uint32_t>(layout.selected_take + row, count);

  // fp32 against double; beyond this a different order is an error.
  const auto above = [&](uint32_t a, uint32_t b) {
    const double floor = sequence.method().group == GroupRule::kSoftmax ? 1e-9 : 1e-5;
    return scores[a] - scores[b] > floor + 1e-5 * (std::fabs(scores[a]) + std::fabs(scores[b]));
  };
  size_t candidates = 0;
  for (const ModelCluster& cluster : clusters) candidates += cluster.positions.size();
  size_t taken = 0;
  std::set<uint32_t> chosen;
  for (size_t s = 0; s < count; ++s) {
    const uint32_t cluster = selection.cluster[s];
    if (cluster >= clusters.size()) {
      ADD_FAILURE() << "cluster " << cluster << " is not published to this step";
      return {};
    }
    EXPECT_TRUE(chosen.insert(cluster).second) << "cluster " << cluster << " twice";
    const size_t size = clusters[cluster].positions.size();
    if (s + 1 < count) {
      EXPECT_EQ(selection.take[s], size) << "only the last one is trimmed";
      EXPECT_FALSE(above(selection.cluster[s + 1], cluster)) << "order at " << s;
    }
    EXPECT_GE(selection.take[s], 1u);
    EXPECT_LE(selection.take[s], size);
    taken += selection.take[s];
  }
  EXPECT_EQ(taken, std::min<size_t>(budget, candidates));
  for (uint32_t c = 0; c < clusters.size(); ++c) {
    if (chosen.contains(c) || count == 0) continue;
    EXPECT_FALSE(above(c, selection.cluster.back())) << "cluster " << c << " was passed over";
  }
  return selection;
}

void DecodeChecker::CheckMeans(size_t i, uint32_t layer, uint32_t kv_head,
                               const std::vector<double>& scores) {
  const StateLayout& layout = sequences_[i]->layout();
  const size_t head = layout.head_index(layer, kv_head);
  std::vector<double>& means = models_[i].mean_scores[head];
  means.resize(scores.size(), 0.0);
  const auto actual = sequences_[i]->state().Download<float>(
      layout.mean_scores + 4 * head * layout.max_clusters, scores.size());
  const double floor = layout.group == GroupRule::kSoftmax ? 1e-9 : 1e-4;
  for (size_t c = 0; c < scores.size(); ++c) {
    means[c] += 0.2 * (scores[c] - means[c]);
    EXPECT_NEAR(actual[c], means[c], floor + 2e-4 * std::fabs(means[c])) << "cluster " << c;
  }
}

void DecodeChecker::CheckResidence(size_t i, uint32_t layer, uint32_t kv_head,
                                   const Selection& selection) {
  TestSequence& sequence = *sequences_[i];
  const StateLayout& layout = sequence.layout();
  Model& model = models_[i];
  const size_t head = layout.head_index(layer, kv_head);
  const auto& clusters = sequence.clusters(layer, kv_head);
  const auto tokens = [&](uint32_t c) { return clusters[c].positions.size(); };
  std::map<uint32_t, uint32_t>& last_used = model.last_used[head];
  for (uint32_t cluster : selection.cluster) last_used[cluster] = model.step;
  const size_t first = 4 * head * layout.max_clusters;
  const auto actual =
      sequence.state().Download<uint32_t>(layout.last_used + first, clusters.size());
  std::vector<uint32_t> victims, kept;
  for (const auto& [cluster, step] : last_used) {
    if (step != model.step) (actual[cluster] == 0 ? victims : kept).push_back(cluster);
  }
  for (uint32_t victim : victims) last_used.erase(victim);
  for (uint32_t c = 0; c < clusters.size(); ++c) {
    ASSERT_EQ(actual[c], last_used.contains(c) ? last_used[c] : 0) << "cluster " << c;
  }
  size_t used = 0;
  for (const auto& [cluster, step] : last_used) used += tokens(cluster);
  const auto free = sequence.state().Download<uint32_t>(layout.free_count + 4 * head, 1).front();
  ASSERT_EQ(free, layout.cache_tokens - used);

  const auto means = sequence.state().Download<float>(layout.mean_scores + first, clusters.size());
  const auto worth = [&](uint32_t c) {
    return layout.group == GroupRule::kSoftmax
               ? means[c] / std::sqrt(static_cast<double>(tokens(c)))
               : means[c] - 0.5 * std::log(static_cast<double>(tokens(c)));
  };
  // The device compares in fp32: of two that are nearly equal either may go first.
  const auto goes_before = [&](uint32_t a, uint32_t b) {
    const double difference = worth(b) - worth(a);
    return difference > 1e-6 * std::fabs(worth(a)) || (difference == 0.0 && a < b);
  };
  bool all_needed = victims.empty();
  for (uint32_t victim : victims) {
    for (uint32_t other : kept) {
      EXPECT_FALSE(goes_before(other, victim)) << "kept " << other << ", evicted " << victim;
    }
    const bool may_be_last = std::ranges::none_of(
        victims, [&](uint32_t other) { return other != victim && goes_before(victim, other); });
    if (may_be_last && used + tokens(victim) > layout.cache_tokens) all_needed = true;
  }
  EXPECT_TRUE(all_needed) << "more was evicted than the misses needed";
  evictions += victims.size();
}

void DecodeChecker::CheckCache(size_t i, uint32_t layer, uint32_t kv_head,
                               const Selection& selection, bool slot_table) {
  TestSequence& sequence = *sequences_[i];
  const StateLayout& layout = sequence.layout();
  Model& model = models_[i];
  const size_t head = layout.head_index(layer, kv_head);
  const auto& clusters = sequence.clusters(layer, kv_head);
  const auto tokens = [&](uint32_t c) { return clusters[c].positions.size(); };
  const std::map<uint32_t, uint32_t>& last_used = model.last_used[head];
  LayerCounters& counters = model.counters[layer];
  for (uint32_t cluster : selection.cluster) {
    if (last_used.contains(cluster)) {
      ++counters.hit_clusters;
      counters.hit_tokens += tokens(cluster);
      ++hits;
    } else {
      ++counters.missed_clusters;
      counters.missed_tokens += tokens(cluster);
      counters.gathered_bytes += tokens(cluster) * layout.row_bytes();
      ++misses;
    }
  }
  ASSERT_NO_FATAL_FAILURE(CheckResidence(i, layer, kv_head, selection));

  const size_t half = layout.row_bytes() / 2;
  const auto cache = sequence.state().Download<std::byte>(
      layout.cache + head * layout.cache_tokens * layout.row_bytes(),
      layout.cache_tokens * layout.row_bytes());
  const auto check_row = [&](uint32_t slot, uint32_t position) {
    ASSERT_LT(slot, layout.cache_tokens);
    const std::byte* const row = &cache[slot * layout.row_bytes()];
    for (bool v : {false, true}) {
      ASSERT_TRUE(std::equal(row + (v ? half : 0), row + (v ? 2 * half : half),
                             sequence.token_bytes(layer, v, position, kv_head)))
          << (v ? "V" : "K") << " of position " << position;
    }
  };
  // Each row of a resident cluster lies in a slot of its own.
  const auto slot_of_row = sequence.state().Download<uint32_t>(
      layout.slot_of_row + 4 * head * layout.max_rows, layout.max_rows);
  const auto entries = sequence.state().Download<ClusterEntry>(
      layout.clusters + sizeof(ClusterEntry) * head * layout.max_clusters, clusters.size());
  std::set<uint32_t> slots;
  for (const auto& [cluster, step] : last_used) {
    for (size_t r = 0; r < tokens(cluster); ++r) {
      const uint32_t slot = slot_of_row[entries[cluster].first_row + r];
      ASSERT_TRUE(slots.insert(slot).second) << "slot " << slot << " twice";
      ASSERT_NO_FATAL_FAILURE(check_row(slot, clusters[cluster].positions[r]));
    }
  }
  if (!slot_table) return;
  // The table leads to the bytes of the selected tokens, in order.
  std::vector<uint32_t> positions;
  for (size_t s = 0; s < selection.cluster.size(); ++s) {
    const auto& members = clusters[selection.cluster[s]].positions;
    positions.insert(positions.end(), members.begin(), members.begin() + selection.take[s]);
  }
  const auto count =
      sequence.state().Download<uint32_t>(layout.slot_count + 4 * kv_head, 1).front();
  ASSERT_EQ(count, positions.size());
  const auto table = sequence.state().Download<uint32_t>(
      layout.slot_table + 4 * size_t{kv_head} * layout.budget_tokens, count);
  for (size_t s = 0; s < count; ++s) {
    ASSERT_NO_FATAL_FAILURE(check_row(table[s], positions[s]));
  }
}

void DecodeChecker::CheckOutput(size_t i, uint32_t layer, uint32_t kv_head,
                                const Selection& selection) {
  const TestSequence& sequence = *sequences_[i];
  const auto& clusters = sequence.clusters(layer, kv_head);
  const double scale = sequence.method().softmax_scale;
  struct Entry {
    std::vector<double> k, v;
    double weight;
  };
  std::vector<Entry> entries;
  const auto add = [&](uint32_t position) {
    entries.push_back({sequence.Row(layer, false, position, kv_head),
                       sequence.Row(layer, true, position, kv_head), 1.0});
  };
  for (uint32_t p = 0; p < std::min(sequence.length, sequence.method().sink_tokens); ++p) add(p);
  for (uint32_t p = models_[i].cut; p < sequence.length; ++p) add(p);
  std::vector<size_t> left;
  left.reserve(clusters.size());
  for (const ModelCluster& cluster : clusters) left.push_back(cluster.positions.size());
  for (size_t s = 0; s < selection.cluster.size(); ++s) {
    const auto& members = clusters[selection.cluster[s]].positions;
    for (uint32_t t = 0; t < selection.take[s]; ++t) add(members[t]);
    left[selection.cluster[s]] -= selection.take[s];
  }
  if (sequence.method().estimate) {
    for (size_t c = 0; c < clusters.size(); ++c) {
      entries.push_back(
          {clusters[c].centroid, clusters[c].value_mean, static_cast<double>(left[c])});
    }
  }
  const auto queries = GroupQueries(i, kv_head);
  for (size_t g = 0; g < queries.size(); ++g) {
    std::vector<double> expected(shape().head_dim, 0.0);
    double sum = 0.0;
    for (const Entry& entry : entries) {
      const double weight = entry.weight * std::exp(Dot(queries[g], entry.k) * scale);
      sum += weight;
      for (size_t d = 0; d < expected.size(); ++d) expected[d] += weight * entry.v[d];
    }
    const size_t q_head = kv_head * queries.size() + g;
    const auto out = out_->Download<float>(
        4 * (i * target_.batch_stride + q_head * target_.head_stride), shape().head_dim);
    for (size_t d = 0; d < expected.size(); ++d) {
      ASSERT_NEAR(out[d], expected[d] / sum, 2e-5) << "query head " << q_head << " element " << d;
    }
    const auto lse = lse_->Download<float>(4 * (i * target_.lse_batch_stride + q_head), 1).front();
    // A logit is a sum of head_dim products in fp32, which tensor cores do not round to nearest.
    ASSERT_NEAR(lse, std::log(sum), 2e-5 + 2e-6 * std::fabs(std::log(sum)))
        << "query head " << q_head;
  }
}

void DecodeChecker::Step(uint32_t budget) {
  DecodeOps& ops = device_.decode_ops();
  ASSERT_TRUE(ops.BeginStep(stream_, batch_).ok());
  for (size_t i = 0; i < sequences_.size(); ++i) {
    ++sequences_[i]->length;
    ++models_[i].step;
    models_[i].cut = sequences_[i]->cut();
  }
  const size_t half = shape().row_bytes() / 2;
  const KvSource source = {.k = appended_->data(),
                           .v = appended_->data() + shape().kv_heads * half,
                           .batch_stride = 2 * shape().kv_heads * half,
                           .head_stride = half};
  const absl::Span<LayerReport> reports(reinterpret_cast<LayerReport*>(reports_->data()),
                                        sequences_.size());
  for (uint32_t layer = 0; layer < shape().layers; ++layer) {
    UploadStep(layer);
    ASSERT_TRUE(ops.Append(stream_, batch_, layer, source).ok());
    const bool in_one = (steps_ + layer) % 2 == 1;
    if (in_one) {
      ASSERT_TRUE(ops.DecodeLayer(stream_, batch_, layer, query_source_, budget, target_).ok());
    } else {
      ASSERT_TRUE(ops.Select(stream_, batch_, layer, query_source_, budget).ok());
      ASSERT_TRUE(ops.Fetch(stream_, batch_, layer).ok());
      ASSERT_TRUE(ops.Attend(stream_, batch_, layer, query_source_, target_).ok());
    }
    ASSERT_TRUE(ops.ReportLayer(stream_, batch_, layer, reports).ok());
    ASSERT_TRUE(stream_.Synchronize().ok());
    for (size_t i = 0; i < sequences_.size(); ++i) {
      for (uint32_t kv_head = 0; kv_head < shape().kv_heads; ++kv_head) {
        SCOPED_TRACE("sequence " + std::to_string(i) + " layer " + std::to_string(layer) +
                     " KV head " + std::to_string(kv_head));
        const std::vector<double> scores = Scores(i, layer, kv_head);
        const Selection selection = CheckSelection(i, layer, kv_head, budget, scores);
        CheckMeans(i, layer, kv_head, scores);
        if (testing::Test::HasFailure()) return;
        CheckCache(i, layer, kv_head, selection, !in_one);
        CheckOutput(i, layer, kv_head, selection);
        if (testing::Test::HasFailure()) return;
      }
      EXPECT_EQ(reports[i].cut, models_[i].cut);
      EXPECT_EQ(reports[i].errors, 0u);
      // Where the daemon samples them, too.
      const auto counters = sequences_[i]->state().Download<LayerCounters>(
          sequences_[i]->layout().counters + layer * sizeof(LayerCounters), 1)[0];
      EXPECT_EQ(std::memcmp(&reports[i].counters, &counters, sizeof(counters)), 0);
      const LayerCounters& expected = models_[i].counters[layer];
      EXPECT_EQ(counters.hit_clusters, expected.hit_clusters);
      EXPECT_EQ(counters.missed_clusters, expected.missed_clusters);
      EXPECT_EQ(counters.hit_tokens, expected.hit_tokens);
      EXPECT_EQ(counters.missed_tokens, expected.missed_tokens);
      EXPECT_EQ(counters.gathered_bytes, expected.gathered_bytes);
    }
  }
  ++steps_;
  errors.assign(sequences_.size(), 99);
  ASSERT_TRUE(ops.EndStep(stream_, batch_, absl::MakeSpan(errors)).ok());
  ASSERT_TRUE(stream_.Synchronize().ok());
}

}  // namespace clusterkv::gpu
