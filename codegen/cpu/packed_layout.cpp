// Packing quantised weights: GGUF's blocks, or codes with scales and mins, into blocks of 16 outputs.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>

#include "packed.h"

namespace eepass {

namespace {

using Bytes = const uint8_t*;

bool spans_of(Kind kind) { return kind == Kind::q4_k || kind == Kind::q5_k || kind == Kind::q6_k; }

int bits_of(Kind kind) {
  switch (kind) {
    case Kind::q8_0: case Kind::u8: return 8;
    case Kind::q5_0: case Kind::q5_1: case Kind::q5_k: return 5;
    case Kind::q6_k: return 6;
    default: return 4;
  }
}

// Bytes of the codes of 16 outputs x 32 inputs.
int64_t code_bytes(Kind kind) { return OUTPUTS * GROUP * bits_of(kind) / 8; }

// Bytes of what precedes the codes of a group, or of a span.
int64_t head_bytes(Kind kind) {
  switch (kind) {
    case Kind::q4_0: case Kind::q5_0: case Kind::q8_0: return 32;
    case Kind::q4_1: case Kind::q5_1: return 64;
    case Kind::u4: case Kind::u8: return 128;
    default: return 64 + 8 * 32;
  }
}

// Bytes of GGUF's block of 32 or 256 inputs of one output.
int64_t gguf_bytes(Kind kind) {
  switch (kind) {
    case Kind::q4_0: return 18;
    case Kind::q4_1: return 20;
    case Kind::q5_0: return 22;
    case Kind::q5_1: return 24;
    case Kind::q8_0: return 34;
    case Kind::q4_k: return 144;
    case Kind::q5_k: return 176;
    case Kind::q6_k: return 210;
    default: TORCH_CHECK(false, "this form is none of GGUF's");
  }
}

// The codes of 32 inputs of 16 outputs, a byte each, to their place in a block and back.
void write_codes(int bits, const uint8_t (*codes)[GROUP], uint8_t* out) {
  std::memset(out, 0, OUTPUTS * GROUP * bits / 8);
  for (int o = 0; o < OUTPUTS; o++)
    for (int i = 0; i < GROUP; i++) {
      const int quad = i / 4, at = o * 4 + i % 4;
      const uint8_t code = codes[o][i];
      if (bits == 8) {
        out[64 * quad + at] = code;
        continue;
      }
      out[64 * (quad / 2) + at] |= (code & 15) << 4 * (quad % 2);
      if (bits == 5) out[256 + at] |= (code >> 4) << quad;
      if (bits == 6) out[256 + 64 * (quad / 4) + at] |= (code >> 4) << 2 * (quad % 4);
    }
}

void read_codes(int bits, const uint8_t* in, uint8_t (*codes)[GROUP]) {
  for (int o = 0; o < OUTPUTS; o++)
    for (int i = 0; i < GROUP; i++) {
      const int quad = i / 4, at = o * 4 + i % 4;
      if (bits == 8) {
        codes[o][i] = in[64 * quad + at];
        continue;
      }
      uint8_t code = in[64 * (quad / 2) + at] >> 4 * (quad % 2) & 15;
      if (bits == 5) code |= (in[256 + at] >> quad & 1) << 4;
      if (bits == 6) code |= (in[256 + 64 * (quad / 4) + at] >> 2 * (quad % 4) & 3) << 4;
      codes[o][i] = code;
    }
}

float half(Bytes p) {
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return c10::detail::fp16_ieee_to_fp32_value(bits);
}

// Scale and min of each 32 inputs of a Q4_K or Q5_K block: 6 bits each, in 12 bytes.
void scale_and_min(Bytes q, int i, uint8_t& scale, uint8_t& low) {
  if (i < 4) {
    scale = q[i] & 63, low = q[i + 4] & 63;
  } else {
    scale = (q[i + 4] & 15) | (q[i - 4] >> 6) << 4;
    low = q[i + 4] >> 4 | (q[i] >> 6) << 4;
  }
}

// The codes of group `g` of one GGUF block.
void gguf_codes(Kind kind, Bytes block, int g, uint8_t* codes) {
  const auto nibbles = [&](Bytes q) {
    for (int i = 0; i < 16; i++) codes[i] = q[i] & 15, codes[i + 16] = q[i] >> 4;
  };
  const auto fifths = [&](Bytes q) {
    uint32_t bits;
    std::memcpy(&bits, q, 4);
    for (int i = 0; i < 32; i++) codes[i] |= (bits >> i & 1) << 4;
  };
  switch (kind) {
    case Kind::q4_0: return nibbles(block + 2);
    case Kind::q4_1: return nibbles(block + 4);
    case Kind::q5_0: return nibbles(block + 6), fifths(block + 2);
    case Kind::q5_1: return nibbles(block + 8), fifths(block + 4);
    case Kind::q8_0:
      for (int i = 0; i < 32; i++) codes[i] = block[2 + i] + 128;
      return;
    case Kind::q4_k: case Kind::q5_k: {
      Bytes q = block + (kind == Kind::q4_k ? 16 : 48) + 32 * (g / 2);
      for (int i = 0; i < 32; i++) codes[i] = q[i] >> 4 * (g % 2) & 15;
      if (kind == Kind::q5_k)
        for (int i = 0; i < 32; i++) codes[i] |= (block[16 + i] >> g & 1) << 4;
      return;
    }
    case Kind::q6_k: {
      // 128 inputs at a time: low halves of groups 0, 1, then their high ones for groups 2, 3
      Bytes low = block + 64 * (g / 4) + 32 * (g % 2), high = block + 128 + 32 * (g / 4);
      for (int i = 0; i < 32; i++)
        codes[i] = (low[i] >> 4 * (g / 2 % 2) & 15) | (high[i] >> 2 * (g % 4) & 3) << 4;
      return;
    }
    default: return;
  }
}

// What precedes the codes, from the blocks of 16 outputs (null past the last).
void gguf_head(Kind kind, const Bytes* blocks, uint8_t* out) {
  for (int o = 0; o < OUTPUTS; o++) {
    Bytes block = blocks[o];
    if (block == nullptr) continue;
    const auto copy_half = [&](int from, int to) { std::memcpy(out + to + 2 * o, block + from, 2); };
    switch (kind) {
      case Kind::q4_0: case Kind::q5_0: case Kind::q8_0: copy_half(0, 0); break;
      case Kind::q4_1: case Kind::q5_1: copy_half(0, 0), copy_half(2, 32); break;
      case Kind::q4_k: case Kind::q5_k:
        copy_half(0, 0), copy_half(2, 32);
        // what is subtracted there is added here
        out[32 + 2 * o + 1] ^= 0x80;
        for (int g = 0; g < 8; g++)
          scale_and_min(block + 4, g, out[64 + 32 * g + o], out[64 + 32 * g + 16 + o]);
        break;
      case Kind::q6_k: {
        const float step = half(block + 208);
        std::memcpy(out + 4 * o, &step, 4);
        for (int i = 0; i < 16; i++) out[64 + 16 * i + o] = block[192 + i];
        break;
      }
      default: break;
    }
  }
}

int64_t inputs_of(Form form, int64_t bytes) {
  const int64_t codes = code_bytes(form.kind), head = head_bytes(form.kind);
  int64_t K = 0;
  if (spans_of(form.kind)) K = bytes / (head + 8 * codes) * SPAN;
  else if (form.kind != Kind::u4 && form.kind != Kind::u8) K = bytes / (head + codes) * GROUP;
  else if (form.group == 0) K = (bytes - head) / codes * GROUP;
  else K = bytes / (head + form.group / GROUP * codes) * form.group;
  TORCH_CHECK(K > 0 && block_bytes(form, K) == bytes, "a packed weight of ", bytes,
              " bytes a block does not fit its form");
  return K;
}

// Calls `head(p, k)` where scales stand and `group(p, k)` where the codes of inputs k .. k + 31 do.
template <typename Head, typename Group>
void walk(Form form, int64_t K, int64_t base, const Head& head, const Group& group) {
  const int64_t every = spans_of(form.kind) ? SPAN
                        : form.kind != Kind::u4 && form.kind != Kind::u8 ? GROUP
                        : form.group ? form.group : K;
  int64_t p = base;
  for (int64_t k = 0; k < K; k += GROUP) {
    if (k % every == 0) head(p, k), p += head_bytes(form.kind);
    group(p, k), p += code_bytes(form.kind);
  }
}

}  // namespace

Form form_of(int64_t number) {
  const int64_t kind = number & 255, group = number >> 8;
  TORCH_CHECK(number >= 0 && kind <= static_cast<int64_t>(Kind::u8), "form ", number, " is unknown");
  const Form form{static_cast<Kind>(kind), group};
  const bool spaced = form.kind == Kind::u4 || form.kind == Kind::u8;
  TORCH_CHECK(spaced ? group % GROUP == 0 : group == 0, "form ", number, " has no groups of ", group);
  return form;
}

int64_t block_bytes(Form form, int64_t K) {
  const int64_t codes = code_bytes(form.kind), head = head_bytes(form.kind), groups = K / GROUP;
  if (spans_of(form.kind)) return K / SPAN * (head + 8 * codes);
  if (form.kind != Kind::u4 && form.kind != Kind::u8) return groups * (head + codes);
  return (form.group ? K / form.group : 1) * head + groups * codes;
}

int64_t packed_inputs(Form form, const at::Tensor& packed) {
  TORCH_CHECK(packed.dim() == 2 && packed.scalar_type() == at::kByte && packed.is_contiguous(),
              "a packed weight is contiguous bytes [blocks, bytes of a block]");
  return inputs_of(form, packed.size(1));
}

namespace {

void pack_gguf(const at::Tensor& blocks, int64_t number, const std::optional<at::Tensor>& order,
               const at::Tensor& packed) {
  const Form form = form_of(number);
  TORCH_CHECK(blocks.dim() == 2 && blocks.scalar_type() == at::kByte && blocks.is_contiguous(),
              "GGUF's blocks are contiguous bytes [N, bytes of a row]");
  const int64_t N = blocks.size(0), size = gguf_bytes(form.kind);
  const int64_t span = spans_of(form.kind) ? SPAN : GROUP;
  TORCH_CHECK(blocks.size(1) % size == 0, "rows of ", blocks.size(1), " bytes are no blocks of ", size);
  const int64_t K = blocks.size(1) / size * span, count = (N + OUTPUTS - 1) / OUTPUTS;
  const int64_t* rows = nullptr;
  if (order.has_value()) {
    TORCH_CHECK(order->scalar_type() == at::kLong && order->is_contiguous() && order->numel() == N,
                "order names each row once");
    rows = order->const_data_ptr<int64_t>();
    for (int64_t n = 0; n < N; n++) TORCH_CHECK(rows[n] >= 0 && rows[n] < N, "order names row ", rows[n]);
  }
  const int64_t bytes = block_bytes(form, K);
  TORCH_CHECK(packed.dim() == 2 && packed.scalar_type() == at::kByte && packed.is_contiguous() &&
                  packed.size(0) == count && packed.size(1) == bytes,
              "packed is contiguous bytes [", count, ", ", bytes, "]");
  Bytes in = blocks.const_data_ptr<uint8_t>();
  uint8_t* out = packed.mutable_data_ptr<uint8_t>();
  // outputs that fill up the last block are zeros
  if (N % OUTPUTS) std::memset(out + (count - 1) * bytes, 0, bytes);
#pragma omp parallel for schedule(static)
  for (int64_t b = 0; b < count; b++) {
    Bytes at[OUTPUTS];
    uint8_t codes[OUTPUTS][GROUP] = {};
    const auto find = [&](int64_t k) {
      for (int o = 0; o < OUTPUTS; o++) {
        const int64_t n = b * OUTPUTS + o;
        at[o] = n < N ? in + (rows ? rows[n] : n) * blocks.size(1) + k / span * size : nullptr;
      }
    };
    walk(
        form, K, b * bytes, [&](int64_t p, int64_t k) { find(k), gguf_head(form.kind, at, out + p); },
        [&](int64_t p, int64_t k) {
          for (int o = 0; o < OUTPUTS; o++)
            if (at[o]) gguf_codes(form.kind, at[o], static_cast<int>(k % span / GROUP), codes[o]);
          write_codes(bits_of(form.kind), codes, out + p);
        });
  }
}

at::Tensor pack_groups(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& mins,
                       int64_t number) {
  const Form form = form_of(number);
  TORCH_CHECK(form.kind == Kind::u4 || form.kind == Kind::u8, "this form is packed from GGUF's blocks");
  const int64_t N = codes.size(0), K = codes.size(1), every = form.group ? form.group : K;
  TORCH_CHECK(codes.scalar_type() == at::kByte && codes.is_contiguous() && K % GROUP == 0 &&
                  K % every == 0 && K > 0,
              "codes are contiguous bytes [N, K], K a multiple of the group");
  for (const auto* t : {&scales, &mins})
    TORCH_CHECK(t->scalar_type() == at::kFloat && t->is_contiguous() && t->dim() == 2 &&
                    t->size(0) == N && t->size(1) == K / every,
                "scales and mins are contiguous float32 [N, K / group]");
  const int64_t count = (N + OUTPUTS - 1) / OUTPUTS, bytes = block_bytes(form, K);
  at::Tensor packed = at::zeros({count, bytes}, codes.options());
  uint8_t* out = packed.mutable_data_ptr<uint8_t>();
  Bytes in = codes.const_data_ptr<uint8_t>();
  const float *s = scales.const_data_ptr<float>(), *m = mins.const_data_ptr<float>();
#pragma omp parallel for schedule(static)
  for (int64_t b = 0; b < count; b++) {
    uint8_t group[OUTPUTS][GROUP] = {};
    const int64_t rows = std::min(OUTPUTS, N - b * OUTPUTS);
    walk(
        form, K, b * bytes,
        [&](int64_t p, int64_t k) {
          for (int64_t o = 0; o < rows; o++) {
            const int64_t from = (b * OUTPUTS + o) * (K / every) + k / every;
            std::memcpy(out + p + 4 * o, s + from, 4);
            std::memcpy(out + p + 64 + 4 * o, m + from, 4);
          }
        },
        [&](int64_t p, int64_t k) {
          for (int64_t o = 0; o < rows; o++)
            std::memcpy(group[o], in + (b * OUTPUTS + o) * K + k, GROUP);
          write_codes(bits_of(form.kind), group, out + p);
        });
  }
  return packed;
}

// Scale and min of output o for inputs from k on (16 or 32 of them), from what precedes the codes.
void scale_of(Kind kind, Bytes head, int o, int64_t k, float& s, float& m) {
  const int g = static_cast<int>(k % SPAN / GROUP), h = static_cast<int>(k % SPAN / 16);
  const auto half_at = [&](int from) { return half(head + from + 2 * o); };
  const auto float_at = [&](int from) {
    float value;
    std::memcpy(&value, head + from + 4 * o, 4);
    return value;
  };
  switch (kind) {
    case Kind::q4_0: s = half_at(0), m = -8 * s; return;
    case Kind::q5_0: s = half_at(0), m = -16 * s; return;
    case Kind::q8_0: s = half_at(0), m = -128 * s; return;
    case Kind::q4_1: case Kind::q5_1: s = half_at(0), m = half_at(32); return;
    case Kind::q4_k: case Kind::q5_k:
      s = half_at(0) * head[64 + 32 * g + o], m = half_at(32) * head[64 + 32 * g + 16 + o];
      return;
    case Kind::q6_k:
      s = float_at(0) * static_cast<int8_t>(head[64 + 16 * h + o]), m = -32 * s;
      return;
    case Kind::u4: case Kind::u8: s = float_at(0), m = float_at(64); return;
  }
}

at::Tensor unpack(const at::Tensor& packed, int64_t number, int64_t outputs,
                  const std::optional<at::Tensor>& ids) {
  const Form form = form_of(number);
  const int64_t K = packed_inputs(form, packed), bytes = packed.size(1);
  TORCH_CHECK(outputs >= 0 && outputs <= packed.size(0) * OUTPUTS, "there are no ", outputs, " outputs");
  const int64_t count = ids.has_value() ? ids->numel() : outputs;
  const int64_t* chosen = nullptr;
  if (ids.has_value()) {
    TORCH_CHECK(ids->scalar_type() == at::kLong && ids->is_contiguous(), "ids are contiguous int64");
    chosen = ids->const_data_ptr<int64_t>();
    for (int64_t i = 0; i < count; i++)
      TORCH_CHECK(chosen[i] >= 0 && chosen[i] < outputs, "there is no output ", chosen[i]);
  }
  at::Tensor values = at::empty({count, K}, packed.options().dtype(at::kFloat));
  float* out = values.mutable_data_ptr<float>();
  Bytes in = packed.const_data_ptr<uint8_t>();
  const int bits = bits_of(form.kind);
  const int64_t part = form.kind == Kind::q6_k ? 16 : GROUP;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < count; i++) {
    const int64_t n = chosen ? chosen[i] : i;
    const int o = static_cast<int>(n % OUTPUTS);
    Bytes head = nullptr;
    walk(
        form, K, n / OUTPUTS * bytes, [&](int64_t p, int64_t) { head = in + p; },
        [&](int64_t p, int64_t k) {
          for (int64_t j = 0; j < GROUP; j += part) {
            float s, m;
            scale_of(form.kind, head, o, k + j, s, m);
            for (int64_t c = j; c < j + part; c++) {
              const int quad = static_cast<int>(c / 4), at = o * 4 + static_cast<int>(c % 4);
              int code;
              if (bits == 8) {
                code = in[p + 64 * quad + at];
              } else {
                code = in[p + 64 * (quad / 2) + at] >> 4 * (quad % 2) & 15;
                if (bits == 5) code |= (in[p + 256 + at] >> quad & 1) << 4;
                if (bits == 6) code |= (in[p + 256 + 64 * (quad / 4) + at] >> 2 * (quad % 4) & 3) << 4;
              }
              out[i * K + k + c] = std::fma(static_cast<float>(code), s, m);
            }
          }
        });
  }
  return values;
}

at::Tensor select_outputs(const at::Tensor& packed, int64_t number, const at::Tensor& ids) {
  const Form form = form_of(number);
  const int64_t K = packed_inputs(form, packed), bytes = packed.size(1), N = ids.numel();
  TORCH_CHECK(ids.scalar_type() == at::kLong && ids.is_contiguous(), "ids are contiguous int64");
  const int64_t* chosen = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < N; i++)
    TORCH_CHECK(chosen[i] >= 0 && chosen[i] < packed.size(0) * OUTPUTS, "there is no output ", chosen[i]);
  const int64_t count = (N + OUTPUTS - 1) / OUTPUTS;
  at::Tensor made = at::zeros({count, bytes}, packed.options());
  Bytes in = packed.const_data_ptr<uint8_t>();
  uint8_t* out = made.mutable_data_ptr<uint8_t>();
  const int bits = bits_of(form.kind);
  // what precedes the codes are lines of 16 numbers: how many, and of how many bytes
  const auto copy_head = [&](Bytes from, uint8_t* to, int a, int b) {
    const auto line = [&](int start, int width) {
      std::memcpy(to + start + width * b, from + start + width * a, width);
    };
    switch (form.kind) {
      case Kind::q4_0: case Kind::q5_0: case Kind::q8_0: return line(0, 2);
      case Kind::q4_1: case Kind::q5_1: return line(0, 2), line(32, 2);
      case Kind::u4: case Kind::u8: return line(0, 4), line(64, 4);
      case Kind::q6_k: line(0, 4); break;
      default: line(0, 2), line(32, 2);
    }
    for (int i = 0; i < 16; i++) line(64 + 16 * i, 1);
  };
#pragma omp parallel for schedule(static)
  for (int64_t block = 0; block < count; block++) {
    const int64_t rows = std::min(OUTPUTS, N - block * OUTPUTS);
    const auto source = [&](int64_t o) { return chosen[block * OUTPUTS + o]; };
    walk(
        form, K, 0,
        [&](int64_t p, int64_t) {
          for (int64_t o = 0; o < rows; o++)
            copy_head(in + source(o) / OUTPUTS * bytes + p, out + block * bytes + p,
                      static_cast<int>(source(o) % OUTPUTS), static_cast<int>(o));
        },
        [&](int64_t p, int64_t) {
          uint8_t codes[OUTPUTS][GROUP] = {}, there[OUTPUTS][GROUP];
          for (int64_t o = 0; o < rows; o++) {
            read_codes(bits, in + source(o) / OUTPUTS * bytes + p, there);
            std::memcpy(codes[o], there[source(o) % OUTPUTS], GROUP);
          }
          write_codes(bits, codes, out + block * bytes + p);
        });
  }
  return made;
}

}  // namespace
}  // namespace eepass

TORCH_LIBRARY_IMPL(eepass, CPU, m) {
  m.impl("pack_gguf", &eepass::pack_gguf);
  m.impl("pack_groups", &eepass::pack_groups);
  m.impl("unpack", &eepass::unpack);
  m.impl("select_outputs", &eepass::select_outputs);
}
