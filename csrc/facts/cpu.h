#pragma once

#include <string>
#include <vector>

namespace velm::facts {

struct Cpu {
  std::string vendor;
  std::string model;
  // As vendors count them: the extended fields of cpuid added.
  int family = 0, model_number = 0;
  // Extensions that both the processor and the operating system support, by the names that compilers use.
  std::vector<std::string> features;
  // The CPU libraries that can run here, from the simplest to the best.
  std::vector<std::string> isas;

  bool has(const std::string& feature) const;
};

const Cpu& cpu();

// Processors this process may run on.
int available_threads();

}  // namespace velm::facts
