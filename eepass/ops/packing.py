"""How quantised weights are packed for integer dot products: operators that pack and unpack them.

A packed weight is bytes [B, bytes]: B blocks of 16 outputs. Its value at output n and input k is
``code * scale + min``, codes unsigned, of 4, 5, 6 or 8 bits. A block goes through its inputs in
order; numbers stand before the codes they belong to, always those of the 16 outputs side by side:

    q4_0, q5_0, q8_0    each 32 inputs: scales float16 (the min is -8, -16, -128 scales), codes
    q4_1, q5_1          each 32 inputs: scales and mins float16, codes
    q4_k, q5_k          each 256 inputs: two steps float16, for each 32 inputs scales and mins as
                        bytes (scale = step 0 * byte, min = step 1 * byte), then codes
    q6_k                each 256 inputs: steps float32, for each 16 inputs scales as signed bytes
                        (the min is -32 scales), then codes
    u4, u8              each ``group`` inputs (0: all): scales and mins float32, codes

The codes of 32 inputs are vectors of 64 bytes, 16 outputs x 4 inputs: for 4 bits vector i holds
inputs 8 i to 8 i + 3 in its lower halves and the next four in its upper ones; bits beyond the
fourth lie in vectors of their own (bit q of a byte, or bits 2 q and 2 q + 1, for the q-th four
inputs); for 8 bits each four inputs have a vector.

``form``: the kind's number in ``KINDS``, plus 256 times the group.

GGUF's formats: ggml's ``ggml-quants.c``; the layout after the dot product instructions of x86.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from eepass.ops.registry import define

KINDS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k", "u4", "u8")
K_KINDS = ("q4_k", "q5_k", "q6_k")
OUTPUTS, GROUP, SPAN = 16, 32, 256
BITS = {"q5_0": 5, "q5_1": 5, "q5_k": 5, "q6_k": 6, "q8_0": 8, "u8": 8}
# bytes of what precedes codes; the others have it for 256 inputs
HEADS = {"q4_0": 32, "q5_0": 32, "q8_0": 32, "q4_1": 64, "q5_1": 64, "u4": 128, "u8": 128}
SPAN_HEAD = 64 + 8 * 32
# bytes of a block of a file
GGUF_BLOCKS = {
    "q4_0": 18, "q4_1": 20, "q5_0": 22, "q5_1": 24, "q8_0": 34,
    "q4_k": 144, "q5_k": 176, "q6_k": 210,
}  # fmt: skip
ZEROS = {"q4_0": 8, "q5_0": 16, "q8_0": 128, "q6_k": 32}


def form_number(kind: str, group: int = 0) -> int:
    """The number that stands for a form; ``group``: for u4 and u8, a multiple of 32 or 0."""
    return KINDS.index(kind) + 256 * group


def _layout(form: int, size: int) -> tuple[str, int, int, int]:
    """Of blocks of ``size`` bytes: kind, inputs that share what precedes their codes (all where 0),
    bytes of that, bytes of the codes of 32 inputs."""
    kind, group = KINDS[form % 256], form // 256
    codes = OUTPUTS * GROUP * BITS.get(kind, 4) // 8
    if kind in ("u4", "u8"):
        return kind, group or (size - HEADS[kind]) // codes * GROUP, HEADS[kind], codes
    if kind in HEADS:
        return kind, GROUP, HEADS[kind], codes
    return kind, SPAN, SPAN_HEAD, codes


def inputs_of(form: int, size: int) -> int:
    """How many inputs a weight has whose blocks are ``size`` bytes."""
    _, every, head, codes = _layout(form, size)
    return size // (head + every // GROUP * codes) * every


def block_size(form: int, inputs: int) -> int:
    """Bytes of a block of a weight with so many inputs."""
    kind, group = KINDS[form % 256], form // 256
    codes = OUTPUTS * GROUP * BITS.get(kind, 4) // 8
    every = group or inputs if kind in ("u4", "u8") else GROUP if kind in HEADS else SPAN
    return inputs // every * (HEADS.get(kind, SPAN_HEAD) + every // GROUP * codes)


def gguf_inputs(form: int, size: int) -> int:
    """How many inputs a row of GGUF blocks of ``size`` bytes has."""
    kind = KINDS[form % 256]
    return size // GGUF_BLOCKS[kind] * (GROUP if kind in HEADS else SPAN)


@define(
    "unpack(Tensor packed, int form, int outputs, Tensor? ids) -> Tensor",
    fake=lambda packed, form, outputs, ids: packed.new_empty(
        outputs if ids is None else ids.numel(),
        inputs_of(form, packed.shape[1]),
        dtype=torch.float32,
    ),
)
def unpack(packed: Tensor, form: int, outputs: int, ids: Tensor | None) -> Tensor:
    """Values float32 [outputs, K], or those of the outputs ``ids`` [n]: [n, K]."""
    kind, every, head, size = _layout(form, packed.shape[1])
    parts = packed.unflatten(1, (-1, head + every // GROUP * size))  # [B, parts, bytes]
    codes = parts[..., head:].unflatten(-1, (every // GROUP, size))  # [B, parts, groups, bytes]
    low = codes[..., :256] if BITS.get(kind, 4) < 8 else codes
    if BITS.get(kind, 4) == 8:
        values = low.unflatten(-1, (8, OUTPUTS, 4))
    else:
        halves = low.unflatten(-1, (4, OUTPUTS, 4))
        values = torch.stack([halves & 15, halves >> 4], -3).flatten(-4, -3)
    if BITS.get(kind) == 5:
        high = codes[..., 256:].unflatten(-1, (1, OUTPUTS, 4))
        shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)[:, None, None]
        values = values | (high >> shifts & 1) << 4
    if BITS.get(kind) == 6:
        high = codes[..., 256:].unflatten(-1, (2, 1, OUTPUTS, 4))
        shifts = 2 * torch.arange(4, device=packed.device, dtype=torch.uint8)[:, None, None]
        values = values | ((high >> shifts & 3) << 4).flatten(-4, -3)
    # [B, parts, groups, 8, 16, 4] -> [B, 16, parts, groups, 32]
    values = values.permute(0, 4, 1, 2, 3, 5).flatten(-2).float()
    scales, mins = _scales(kind, parts[..., :head], every)  # [B, parts, scales, 16]
    scales, mins = (x.permute(0, 3, 1, 2).flatten(2)[..., None] for x in (scales, mins))
    values = values.flatten(2).unflatten(2, (scales.shape[2], -1))
    # the product is rounded once, as the kernels' fused multiplication does
    values = (values.double() * scales.double() + mins.double()).float()
    values = values.flatten(2).flatten(0, 1)[:outputs]
    return values if ids is None else values[ids]


def _scales(kind: str, head: Tensor, every: int) -> tuple[Tensor, Tensor]:
    """Scales and mins float32 [B, parts, scales, 16] from the bytes that precede codes."""

    def numbers(start: int, count: int, dtype: torch.dtype) -> Tensor:
        part = head[..., start : start + count * dtype.itemsize].contiguous()
        return part.view(dtype).float().unflatten(-1, (-1, OUTPUTS))

    if kind in ("u4", "u8"):
        return numbers(0, 16, torch.float32), numbers(64, 16, torch.float32)
    if kind in ("q4_1", "q5_1"):
        return numbers(0, 16, torch.float16), numbers(32, 16, torch.float16)
    if kind in ("q4_k", "q5_k"):
        each = numbers(64, 256, torch.uint8).unflatten(-2, (8, 2))
        steps = numbers(0, 16, torch.float16), numbers(32, 16, torch.float16)
        return steps[0] * each[..., 0, :], steps[1] * each[..., 1, :]
    if kind == "q6_k":
        scales = numbers(0, 16, torch.float32) * numbers(64, 256, torch.int8)
    else:
        scales = numbers(0, 16, torch.float16)
    return scales, scales * -ZEROS[kind]


@define(
    "pack_groups(Tensor codes, Tensor scales, Tensor mins, int form) -> Tensor",
    fake=lambda codes, form: codes.new_empty(
        -(-len(codes) // OUTPUTS), block_size(form, codes.shape[1])
    ),
)
def pack_groups(codes: Tensor, scales: Tensor, mins: Tensor, form: int) -> Tensor:
    """Codes uint8 [N, K] with scales and mins float32 [N, K / group], packed as u4 or u8."""
    kind, group = KINDS[form % 256], form // 256 or codes.shape[1]
    padding = -len(codes) % OUTPUTS
    codes, scales, mins = (F.pad(x, (0, 0, 0, padding)) for x in (codes, scales, mins))

    def numbers(x: Tensor) -> Tensor:
        # [N, parts] -> [B, parts, bytes of 16 numbers]
        return x.unflatten(0, (-1, OUTPUTS)).transpose(1, 2).contiguous().view(torch.uint8)

    # [B, 16, parts, groups, 8, 4] -> [B, parts, groups, 8, 16, 4]
    parts = codes.view(-1, OUTPUTS, codes.shape[1] // group, group // GROUP, 8, 4)
    parts = parts.permute(0, 2, 3, 4, 1, 5)
    if kind == "u4":
        parts = parts[..., 0::2, :, :] | parts[..., 1::2, :, :] << 4
    packed = torch.cat([numbers(scales), numbers(mins), parts.flatten(2)], -1)
    return packed.flatten(1).contiguous()


def gguf_packed_shape(blocks: Tensor, form: int) -> tuple[int, int]:
    """The shape of GGUF's rows of ``blocks`` packed: blocks of outputs, bytes of a block."""
    return -(-len(blocks) // OUTPUTS), block_size(form, gguf_inputs(form, blocks.shape[1]))


@define(
    "pack_gguf(Tensor blocks, int form, Tensor? order, Tensor(a!) packed) -> ()",
    fake=lambda: None,
)
def pack_gguf(blocks: Tensor, form: int, order: Tensor | None, packed: Tensor) -> None:
    """GGUF's rows of blocks, bytes [N, bytes of a row], written to ``packed``, of the shape that
    ``gguf_packed_shape`` gives; ``order`` int64 [N]: the row each output takes. Wants the C++
    kernels."""
    raise NotImplementedError("GGUF's blocks are packed by the C++ kernels")


@define(
    "select_outputs(Tensor packed, int form, Tensor ids) -> Tensor",
    fake=lambda packed, ids: packed.new_empty(-(-len(ids) // OUTPUTS), packed.shape[1]),
)
def select_outputs(packed: Tensor, form: int, ids: Tensor) -> Tensor:
    """The packed weight of the outputs ``ids`` [n] alone."""
    size = packed.shape[1]
    _, every, head, code_bytes = _layout(form, size)
    # which output each byte of a block belongs to
    owner = torch.empty(head + every // GROUP * code_bytes, dtype=torch.long)
    owner[head:] = (
        torch.arange(OUTPUTS).repeat_interleave(4).repeat(every // GROUP * code_bytes // 64)
    )
    kind = KINDS[form % 256]
    widths = {32: [2] * 1, 64: [2, 2], 128: [4, 4]}.get(head)
    if widths is None:
        widths = [4] if kind == "q6_k" else [2, 2]
        widths = [*widths, *[1] * 16]
    owner[:head] = torch.cat([torch.arange(OUTPUTS).repeat_interleave(w) for w in widths])
    owner = owner.repeat(size // len(owner)).to(packed.device)
    # bytes of an output among those of its block, in order
    rows = packed.new_empty(len(packed), OUTPUTS, size // OUTPUTS)
    for output in range(OUTPUTS):
        rows[:, output] = packed[:, owner == output]
    padded = F.pad(ids, (0, -len(ids) % OUTPUTS))
    chosen = rows.flatten(0, 1)[padded].clone()
    chosen[len(ids) :] = 0
    chosen = chosen.unflatten(0, (-1, OUTPUTS))
    made = packed.new_empty(len(chosen), size)
    for output in range(OUTPUTS):
        made[:, owner == output] = chosen[:, output]
    return made
