#include "attention/cross_attention/cpu_backward_plan.h"

#include <algorithm>

#include "attention/cross_attention/cpu_panel.h"

namespace velm::attention {

namespace {

// Enough jobs for this many threads to share evenly.
constexpr int64_t kJobs = 32;
// But none with fewer multiply-adds than this: every part of the keys packs the queries again.
constexpr int64_t kLeastWork = 1 << 26;
// Floats in all copies of the bias gradient, where there is more than one.
constexpr int64_t kPartialFloats = 1 << 24;

}  // namespace

Plan make_plan(const Problem& p, const int64_t* bias_size) {
  Plan plan;
  int64_t chunks = 1, scores = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    chunks = std::max(chunks, (p.key_count(b) + kChunk - 1) / kChunk);
    scores += p.heads * p.query_count(b) * p.key_count(b);
  }
  const int64_t pairs = std::max<int64_t>(1, p.batch * p.kv_heads);
  const int64_t slices =
      bias_size ? std::max<int64_t>(1, (bias_size[0] > 1 ? p.batch : 1) * (bias_size[1] > 1 ? p.kv_heads : 1)) : pairs;
  const int64_t work = scores / slices * (3 * p.head_dim + 2 * p.value_dim);
  plan.splits = std::clamp<int64_t>(std::min(kJobs / slices, work / kLeastWork), 1, chunks);
  int64_t most = pairs / slices;
  if (bias_size) {
    const int64_t floats = bias_size[0] * bias_size[1] * bias_size[2] * bias_size[3];
    most = std::min(most, std::max<int64_t>(1, kPartialFloats / std::max<int64_t>(1, floats)));
  }
  plan.groups = std::clamp<int64_t>(kJobs / 2 / (slices * plan.splits), 1, std::max<int64_t>(1, most));
  plan.partials = plan.groups * (bias_size && bias_size[3] == 1 ? plan.splits : 1);
  return plan;
}

int64_t panel_count(const Problem& p, int64_t b) {
  return (p.group * p.query_count(b) + kPanel - 1) / kPanel;
}

int64_t bias_partials(const Problem& p, const int64_t (&bias_size)[4]) {
  return make_plan(p, bias_size).partials;
}

std::vector<Job> make_jobs(const Problem& p, const Gradients& g, const Plan& plan) {
  const int64_t pairs = p.batch * p.kv_heads;
  // Pairs that add to the same slice of the bias gradient are dealt out to `groups` jobs with a copy each.
  const int64_t bias_count = g.bias_size[0] * g.bias_size[1] * g.bias_size[2] * g.bias_size[3];
  std::vector<std::vector<Pair>> lists;
  if (g.grad_bias) {
    const int64_t batches = g.bias_size[0] > 1 ? p.batch : 1, heads = g.bias_size[1] > 1 ? p.kv_heads : 1;
    lists.resize(static_cast<size_t>(batches * heads * plan.groups));
    std::vector<int64_t> seen(static_cast<size_t>(batches * heads), 0);
    for (int64_t i = 0; i < pairs; ++i) {
      const int64_t b = i / p.kv_heads, h = i % p.kv_heads;
      const int64_t slice = (batches > 1 ? b : 0) * heads + (heads > 1 ? h : 0);
      lists[slice * plan.groups + seen[slice]++ % plan.groups].push_back({b, h});
    }
  } else {
    for (int64_t i = 0; i < pairs; ++i) lists.push_back({{i / p.kv_heads, i % p.kv_heads}});
  }
  std::vector<Job> jobs;
  for (size_t i = 0; i < lists.size(); ++i) {
    for (int64_t s = 0; s < plan.splits; ++s) {
      const int64_t group = static_cast<int64_t>(i) % plan.groups;
      const int64_t copy = plan.partials > plan.groups ? group * plan.splits + s : group;
      jobs.push_back({lists[i], s, g.grad_bias ? g.grad_bias + copy * bias_count : nullptr});
    }
  }
  return jobs;
}

}  // namespace velm::attention
