#include "tests/device_on_host/testing.h"

namespace testing {

std::map<std::string, std::function<void()>>& tests() {
  static std::map<std::string, std::function<void()>> all;
  return all;
}

}  // namespace testing

int main(int count, char** arguments) {
  if (count == 1)
    for (const auto& test : testing::tests())
      // Faults for the sanitizers end the program.
      if (test.first.find("planted") != 0) std::puts(test.first.c_str());
  for (int i = 1; i < count; ++i) {
    const auto found = testing::tests().find(arguments[i]);
    if (found == testing::tests().end()) testing::failed("main", 0, std::string("there is no test ") + arguments[i]);
    found->second();
  }
}
