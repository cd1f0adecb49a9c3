// Weights packed for integer dot products, and rows of activations to multiply them with.
//
// A block is 16 outputs. Their codes, unsigned, lie 32 inputs at a time as vectors of 16 outputs x 4
// inputs, so that one instruction multiplies a vector with 4 activations of a row and no sum is ever
// taken across lanes. `eepass/ops/packed.py` describes the layout of each form.

#pragma once

#include <cstdint>

namespace at {
class Tensor;
}

namespace eepass {

// Inputs whose activations are laid out together.
constexpr int64_t SPAN = 256;
// Outputs of a block, and inputs of a group of codes.
constexpr int64_t OUTPUTS = 16, GROUP = 32;

// How a weight is packed. `group`: inputs that share a scale, 0 for all of a row; only for the forms
// `u4` and `u8`, the others are GGUF's.
enum class Kind { q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k, q6_k, u4, u8 };
struct Form {
  Kind kind;
  int64_t group;
};

// The form an operator's number stands for: the kind in the low byte, the group above it.
Form form_of(int64_t number);
// Bytes of a block for K inputs.
int64_t block_bytes(Form form, int64_t K);
// K of a packed weight [blocks, bytes]; raises where the bytes do not fit the form.
int64_t packed_inputs(Form form, const at::Tensor& packed);

// What kernels read of R rows of activations, from front to back, for each SPAN inputs: 64 words [R]
// of 4 signed bytes, or SPAN floats [R]; then the sums of each 32 inputs [8][R] and of each 16
// [16][R], and the scales [8][R], of which only the first row counts where there is one for all.
// Every word has 4 bytes.
constexpr int64_t words_of(bool integers) { return integers ? SPAN / 4 : SPAN; }
constexpr int64_t span_words(bool integers) { return words_of(integers) + 8 + 16 + 8; }

// A linear layer's weight [N, K].
struct PackedLayer {
  Form form;
  const uint8_t* weight;
  int64_t N, K;
};

// How rows of x are rounded: to int8 with a scale for each GROUP or SPAN inputs, with one for the
// whole row as torchao does it, or not at all.
enum class Rounding { groups, spans, row, none };

// Whether x may have a scale for each SPAN inputs only, as ggml has it for its K types.
inline bool coarse(Form form) {
  return form.kind == Kind::q4_k || form.kind == Kind::q5_k || form.kind == Kind::q6_k;
}

struct PackedKernels {
  // rows that are multiplied together at most; others: 1, 2, 4
  int most_rows;
  // one block times `rows` rows -> out [rows, OUTPUTS]; `fetch`: ask for the next weights ahead
  void (*multiply)(const PackedLayer& layer, int64_t block, const int32_t* x, int rows,
                   Rounding rounding, bool fetch, float* out);
  // one row of x [K], float32 or (`bf16`) bfloat16, as row r of a tile of R rows
  void (*prepare)(const void* x, bool bf16, int64_t K, Rounding rounding, int64_t R, int64_t r,
                  int32_t* tile);
};

// null where the library was built without them
[[gnu::weak]] const PackedKernels* packed_kernels_avx512();
[[gnu::weak]] const PackedKernels* packed_kernels_avxvnni();
[[gnu::weak]] const PackedKernels* packed_kernels_avx2();

}  // namespace eepass
