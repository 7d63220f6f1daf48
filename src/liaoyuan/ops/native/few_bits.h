// What operators with weights of few bits check of them; for the files that know torch (binding_inference.cpp).
#pragma once
#include <string>

#include "operators.h"

namespace liaoyuan {

// Weights of `depth` inputs, by pointer; all parts are contiguous.
QuantisedWeights quantised_weights(const Tensor& data, const Tensor& scales, const OptionalTensor& zeros,
                                   const std::string& kind, int64_t group, int64_t depth);

}  // namespace liaoyuan
