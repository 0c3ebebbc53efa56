// The products of attention over pairs of bfloat16, for test_libraries.py to read where the library for avx512_bf16 is
// not built because the processor cannot run it.
#include "simd/product.h"

namespace velm::simd {

template <bool RowUnit, Start S>
constexpr auto kPairs = &product<2, RowUnit, S, uint32_t>;

extern const decltype(kPairs<false, Start::zero>) bf16_products[];
const decltype(kPairs<false, Start::zero>) bf16_products[] = {
    kPairs<false, Start::zero_scale_product>,
    kPairs<false, Start::zero>,
    kPairs<true, Start::scale>,
    kPairs<true, Start::add>,
    kPairs<false, Start::add>,
};

}  // namespace velm::simd
