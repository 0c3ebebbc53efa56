# The CUDA library, where there is nvcc, and for the tests the library that runs the same kernels on the host.
#
# VELM_BUILD_CUDA and VELM_CUDA_ARCHS are read from the environment when the build is first configured, so that they
# also reach a build by pip. nvcc alone decides: neither a GPU nor a torch built for CUDA is needed to build.

set(VELM_BUILD_CUDA "$ENV{VELM_BUILD_CUDA}" CACHE STRING "1: the CUDA library must be built, 0: not, empty: if nvcc is there")
set(VELM_CUDA_ARCHS "$ENV{VELM_CUDA_ARCHS}" CACHE STRING "Compute capabilities, e.g. 80;90a (empty: all)")
string(REPLACE "," ";" VELM_CUDA_ARCHS "${VELM_CUDA_ARCHS}")

# Sources are found by their place: csrc/<family>/<operator>/cuda*.cu and cuda*.cpp, and csrc/<family>/cuda*.cu, which
# operators of a family share.
file(GLOB VELM_KERNEL_SOURCES CONFIGURE_DEPENDS RELATIVE "${CMAKE_SOURCE_DIR}/csrc" "csrc/*/cuda*.cu" "csrc/*/*/cuda*.cu")
file(GLOB VELM_KERNEL_OPERATORS CONFIGURE_DEPENDS RELATIVE "${CMAKE_SOURCE_DIR}" "csrc/*/*/cuda*.cpp")

# On the path and nowhere else but in CUDA_HOME: who takes nvcc off the path does not want it.
find_program(VELM_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin
  NO_CMAKE_PATH NO_CMAKE_ENVIRONMENT_PATH NO_CMAKE_SYSTEM_PATH)
set(VELM_CUDA_NOTE "${VELM_OUTPUT_DIR}/_lib/cuda_not_built.txt")
set(why_not "")
if(VELM_BUILD_CUDA STREQUAL "0")
  set(why_not "VELM_BUILD_CUDA=0 was set when velm_kernels was built.")
elseif(NOT VELM_NVCC)
  set(why_not "nvcc was found neither on the path nor in CUDA_HOME when velm_kernels was built.")
  if(VELM_BUILD_CUDA)
    message(FATAL_ERROR "VELM_BUILD_CUDA=${VELM_BUILD_CUDA}, but nvcc is neither on the path nor in CUDA_HOME.")
  endif()
endif()

if(NOT why_not)
  execute_process(COMMAND "${VELM_NVCC}" --list-gpu-code OUTPUT_VARIABLE known ERROR_QUIET)
  execute_process(COMMAND "${VELM_NVCC}" --version OUTPUT_VARIABLE version ERROR_QUIET)
  string(REGEX MATCH "release ([0-9]+)" version "${version}")
  if(NOT CMAKE_MATCH_1 GREATER_EQUAL 12)
    set(why_not "${VELM_NVCC} does not know C++20: the CUDA library needs nvcc 12 or newer.")
  elseif(NOT VELM_CUDA_ARCHS)
    # Of all that this library is for, what this nvcc knows.
    foreach(arch 80 90a 100 120)
      # The list has no variants such as 90a.
      string(REGEX REPLACE "[a-z]$" "" plain "${arch}")
      if("${known}\n" MATCHES "sm_${plain}[\r\n]")
        list(APPEND VELM_CUDA_ARCHS ${arch})
      endif()
    endforeach()
  endif()
endif()

if(why_not)
  message(STATUS "no CUDA library: ${why_not}")
  # One that an earlier build left in the source tree would be loaded.
  file(REMOVE "${VELM_OUTPUT_DIR}/_lib/libvelm_cuda.so")
  file(WRITE "${VELM_CUDA_NOTE}" "${why_not}\n")
else()
  file(REMOVE "${VELM_CUDA_NOTE}")
  set(CMAKE_CUDA_COMPILER "${VELM_NVCC}")
  set(CMAKE_CUDA_ARCHITECTURES OFF)
  # The kernels use nothing that sm_80 lacks. So they become PTX once, machine code of each architecture from that, which
  # takes half the time of compiling for each from the start, and later devices compile the PTX when they load it.
  list(TRANSFORM VELM_CUDA_ARCHS PREPEND "sm_" OUTPUT_VARIABLE codes)
  list(JOIN codes "," codes)
  set(VELM_CUDA_CODE "--generate-code=arch=compute_80,code=[${codes},compute_80]")
  set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}" CACHE STRING "")
  if(VELM_CCACHE AND NOT CMAKE_CUDA_COMPILER_LAUNCHER)
    set(CMAKE_CUDA_COMPILER_LAUNCHER "${VELM_CCACHE}")
  endif()
  enable_language(CUDA)
  # CMake 3.25 does not know that nvcc has C++20.
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
  endif()
  message(STATUS "CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${VELM_CUDA_ARCHS}")
  # The CUDA runtime goes into the library, and a driver serves none of a later major version than its own.
  find_program(VELM_NVIDIA_SMI nvidia-smi NO_CACHE)
  if(VELM_NVIDIA_SMI)
    execute_process(COMMAND "${VELM_NVIDIA_SMI}" OUTPUT_VARIABLE driver ERROR_QUIET)
    string(REGEX MATCH "CUDA Version: *([0-9]+)" found "${driver}")
    set(serves "${CMAKE_MATCH_1}")
    string(REGEX MATCH "^[0-9]+" needs "${CMAKE_CUDA_COMPILER_VERSION}")
    if(found AND serves LESS needs)
      message(WARNING "The driver of this machine serves CUDA ${serves}, and the CUDA library is built with "
        "${CMAKE_CUDA_COMPILER_VERSION}: here it will not run. Build with nvcc ${serves}, or update the driver.")
    endif()
  endif()

  set(kernels ${VELM_KERNEL_SOURCES})
  list(TRANSFORM kernels PREPEND "csrc/")
  add_library(velm_cuda MODULE csrc/build_info.cpp ${kernels} ${VELM_KERNEL_OPERATORS})
  list(JOIN VELM_CUDA_ARCHS "," archs)
  string(REGEX MATCH "^[0-9]+\\.[0-9]+" cuda_version "${CMAKE_CUDA_COMPILER_VERSION}")
  target_compile_definitions(velm_cuda PRIVATE VELM_NAMESPACE=velm_cuda "VELM_ISA=\"${archs}\"" "VELM_PTX=\"80\""
    "VELM_CUDA_VERSION=\"${cuda_version}\"")
  if(VELM_CUDA_SMALL)
    target_compile_definitions(velm_cuda PRIVATE VELM_ONLY_SMALL)
  endif()
  target_include_directories(velm_cuda PRIVATE "${CMAKE_SOURCE_DIR}/csrc")
  target_compile_options(velm_cuda PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra>
    "$<$<COMPILE_LANGUAGE:CUDA>:${VELM_CUDA_CODE};-Xcompiler=-Wall>")
  set_target_properties(velm_cuda PROPERTIES CUDA_VISIBILITY_PRESET hidden CUDA_RUNTIME_LIBRARY Static)
  # torch opens its libraries so that their symbols are seen by those alone that name them as needed (RTLD_LOCAL). So
  # this library names libtorch_cuda.so, and the loader takes the one that is in the process. What it is linked with is a
  # stand-in of that name, beside a torch for CPUs and one for CUDA alike: it is neither installed nor looked for later.
  add_library(velm_torch_cuda SHARED cmake/torch_cuda.cpp)
  set_target_properties(velm_torch_cuda PROPERTIES
    OUTPUT_NAME torch_cuda LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/stand_in")
  target_link_libraries(velm_cuda PRIVATE velm_torch_cuda torch_stable torch_cpu)
  target_link_options(velm_cuda PRIVATE
    "-Wl,--version-script=${CMAKE_SOURCE_DIR}/cmake/exports.map" -Wl,--as-needed -Wl,--no-undefined)
  set_target_properties(velm_cuda PROPERTIES
    SUFFIX .so LINK_DEPENDS "${CMAKE_SOURCE_DIR}/cmake/exports.map" LIBRARY_OUTPUT_DIRECTORY "${VELM_OUTPUT_DIR}/_lib")
endif()

if(VELM_TESTING)
  include("${CMAKE_SOURCE_DIR}/cmake/device_on_host.cmake")
  # As C++ under a name of their own: a file has one language in a directory.
  set(wrapped "")
  foreach(source IN LISTS VELM_KERNEL_SOURCES)
    string(REPLACE "/" "_" name "${source}")
    set(wrapper "${CMAKE_BINARY_DIR}/device_on_host/${name}.cpp")
    file(CONFIGURE OUTPUT "${wrapper}" CONTENT "#include \"${source}\"\n")
    list(APPEND wrapped "${wrapper}")
  endforeach()
  add_library(velm_device_on_host MODULE
    csrc/build_info.cpp csrc/device_on_host/counters.cpp ${DEVICE_ON_HOST_SOURCES} ${wrapped} ${VELM_KERNEL_OPERATORS})
  target_compile_definitions(velm_device_on_host PRIVATE
    VELM_NAMESPACE=velm_device_on_host VELM_ISA="device_on_host" VELM_DEVICE_ON_HOST)
  target_include_directories(velm_device_on_host PRIVATE "${CMAKE_SOURCE_DIR}/csrc")
  target_compile_options(velm_device_on_host PRIVATE -O1 -g0 -Wall -Wextra -Wno-unknown-pragmas)
  find_package(Threads REQUIRED)
  target_link_libraries(velm_device_on_host PRIVATE torch_stable torch_cpu Threads::Threads)
  target_link_options(velm_device_on_host PRIVATE
    "-Wl,--version-script=${CMAKE_SOURCE_DIR}/cmake/exports.map" -Wl,--as-needed -Wl,--no-undefined)
  set_target_properties(velm_device_on_host PROPERTIES
    SUFFIX .so LINK_DEPENDS "${CMAKE_SOURCE_DIR}/cmake/exports.map" LIBRARY_OUTPUT_DIRECTORY "${VELM_OUTPUT_DIR}/_lib")
endif()
