# The runtime of csrc/device_on_host: for the library of operators and for its own tests.
cmake_path(GET CMAKE_CURRENT_LIST_DIR PARENT_PATH DEVICE_ON_HOST_ROOT)
set(DEVICE_ON_HOST_SOURCES)
foreach(name block fiber fibers launch real_threads shared_memory warp)
  list(APPEND DEVICE_ON_HOST_SOURCES "${DEVICE_ON_HOST_ROOT}/csrc/device_on_host/${name}.cpp")
endforeach()
