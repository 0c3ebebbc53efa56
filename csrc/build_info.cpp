// What a library says about itself, readable without torch: ctypes.CDLL(path).velm_build_info.

#include <string>

#define VELM_STRINGIZE_(x) #x
#define VELM_STRINGIZE(x) VELM_STRINGIZE_(x)

#if defined(__clang__)
#define VELM_COMPILER "clang " __clang_version__
#else
#define VELM_COMPILER "gcc " __VERSION__
#endif

// One "name=value" a line. The package compares the version with its own, so that a library left over from an older
// build is reported instead of loaded.
extern "C" __attribute__((visibility("default"))) const char* velm_build_info() {
  return "version=" VELM_VERSION "\n"
         "isa=" VELM_ISA "\n"
         "namespace=" VELM_STRINGIZE(VELM_NAMESPACE) "\n"
         "torch=" VELM_TORCH_VERSION "\n"
         "compiler=" VELM_COMPILER
#if defined(VELM_CUDA_VERSION)
         // The version of the CUDA runtime inside, which the driver must know, and the architecture of the PTX.
         "\ncuda=" VELM_CUDA_VERSION "\nptx=" VELM_PTX
#endif
      ;
}

namespace {
std::string& signatures() {
  static std::string all;
  return all;
}
}  // namespace

// By static initialisers, when the library is opened.
extern "C" void velm_note_signature(const char* name, const char* types) {
  signatures().append(name).append("(").append(types).append(")\n");
}

// "name(types of arguments)" a line: what the kernels of this library were compiled to take. The package compares them
// with what it declares, so that one that was left over from other sources of the same version is not called.
extern "C" __attribute__((visibility("default"))) const char* velm_signatures() {
  return signatures().c_str();
}
