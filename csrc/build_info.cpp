// What a library says about itself, readable without torch: ctypes.CDLL(path).velm_build_info.

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
