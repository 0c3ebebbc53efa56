// How the work of the backward pass is cut into jobs, from sizes alone and never from threads.
#pragma once

#include <vector>

#include "attention/cross_attention/cpu_backward.h"

namespace velm::attention {

// Keys of a chunk, of which every job has whole ones.
inline constexpr int64_t kChunk = 96;

struct Pair {
  int64_t b, kv_head;
};

struct Job {
  std::vector<Pair> pairs;
  int64_t split;
  float* grad_bias;
};

struct Plan {
  int64_t splits = 1;    // parts of the keys of every pair
  int64_t partials = 1;  // copies of the bias gradient
  int64_t groups = 1;    // jobs that share a slice of the bias gradient
};

Plan make_plan(const Problem& p, const int64_t* bias_size);

// Panels of queries that share a key head of batch entry b.
int64_t panel_count(const Problem& p, int64_t b);

// Every pair of batch entry and key head, `plan.splits` times, and where each job adds to the bias gradient.
std::vector<Job> make_jobs(const Problem& p, const Gradients& g, const Plan& plan);

}  // namespace velm::attention
