// What the files that know torch share: tensors as the kernels take them, and what a file registers.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "kernels.h"

namespace liaoyuan {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Register a kernel of mixtures of experts (binding_experts.cpp); false: there is none of this name.
bool register_experts(torch::Library& library, const std::string& name);
// Register a kernel of binding_inference.cpp or binding_optimiser.cpp; false: there is none of this name.
bool register_inference(torch::Library& library, const std::string& name);
bool register_optimiser(torch::Library& library, const std::string& name);
// Register the kernel of the loss head (binding_loss.cpp); false: there is none of this name.
bool register_loss(torch::Library& library, const std::string& name);
// Register a kernel of rotary embedding or gated activations (binding_rows.cpp); false: there is none of this name.
bool register_rows(torch::Library& library, const std::string& name);
// Register a kernel of attention (binding_attention.cpp); false: there is none of this name.
bool register_attention(torch::Library& library, const std::string& name);
// Register a kernel of the decoder layer (binding_layer.cpp); false: there is none of this name.
bool register_layer(torch::Library& library, const std::string& name);

// Define what records calls of operators and makes them again (recording.cpp).
void define_recording(torch::Library& library);

// Register the differentiable side of the operator `name`; does nothing for operators without one.
void register_autograd(torch::Library& library, const std::string& name);
void register_experts_autograd(torch::Library& library, const std::string& name);
void register_loss_autograd(torch::Library& library, const std::string& name);
void register_rows_autograd(torch::Library& library, const std::string& name);

}  // namespace liaoyuan
