// Reads one element wherever it is told to, compiled like the operator libraries: the address sanitizer must object to
// an element that does not belong to the tensor.
extern "C" __attribute__((visibility("default"))) float planted_read(const float* data, long index) {
  return data[index];
}
