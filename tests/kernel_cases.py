"""Arguments of the fused operators, small and odd, for the interpreter and for a GPU alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eepass.codegen.cpu.native import kernel_isa

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# of the largest expected value, in float32 results and in those rounded to a dtype
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


class Case:
    """Random tensors of one dtype on one device, the same every time."""

    def __init__(self, dtype: str = "fp32", device: str = "cpu", seed: int = 0) -> None:
        self.dtype, self.device = DTYPES[dtype], device
        self.generator = torch.Generator().manual_seed(seed)

    def random(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(*shape, generator=self.generator) * scale
        return values.to(dtype or self.dtype).to(self.device)

    def ids(self, below: int, *shape: int) -> Tensor:
        return torch.randint(0, below, shape, generator=self.generator).to(self.device)

    def head(
        self, vocabulary: int, hidden: int, kind: str = "", bias: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """lm_head, its scales where ``kind`` is int8, its bias."""
        weight, scales = self.random(vocabulary, hidden, scale=hidden**-0.5), None
        if kind == "int8":
            scales = weight.float().abs().amax(1) / 127
            weight = (weight.float() / scales[:, None]).round().to(torch.int8)
        return weight, scales, self.random(vocabulary) if bias else None

    def to_state(
        self, rows: int, hidden: int, rank: int = 0, norm: str = "rms", bias: bool = False
    ) -> tuple[Any, ...]:
        """hidden, translator and norm; with a mean for LayerNorm to subtract."""
        states = self.random(rows, hidden) + (5.0 if norm == "layer" else 0.0)
        translator: tuple[Any, ...] = (None, None, None)
        if rank:
            translator = (
                1 + self.random(hidden, scale=0.1),
                self.random(rank, hidden, scale=hidden**-0.5),
                self.random(hidden, rank, scale=0.2),
            )
        weight = None if norm == "none" else self.random(hidden)
        return states, *translator, weight, self.random(hidden) if bias else None

    def predictor(self, rows: int, drafts: int, width: int = 40) -> tuple[Tensor, ...]:
        floats = torch.float32
        return (
            self.random(rows, drafts, dtype=floats).softmax(-1),
            self.random(width, 3 * drafts, scale=0.3, dtype=floats),
            self.random(width, dtype=floats),
            self.random(width, scale=0.3, dtype=floats),
            self.random(1, dtype=floats),
            torch.tensor([0.5], device=self.device),
        )


def exit_case(
    rows: int = 1, hidden: int = 63, drafts: int = 4, rank: int = 0, norm: str = "rms",
    dtype: str = "fp32", vocabulary: int = 1000, width: int = 40, head: str = "",
    norm_bias: bool = False, head_bias: bool = False, offset: float = 0.0, scale: float = 1.0,
    cap: float = 0.0, device: str = "cpu",
) -> list[Any]:  # fmt: skip
    """Arguments of ``exit_predictor``."""
    case = Case(dtype, device)
    return [
        *case.to_state(rows, hidden, rank, norm, norm_bias),
        *case.head(vocabulary, hidden, head, head_bias),
        case.ids(vocabulary, rows, drafts), *case.predictor(rows, drafts, width),
        norm, 1e-5, offset, scale, cap,
    ]  # fmt: skip


def verify_case(
    rows: int = 1, hidden: int = 63, vocabulary: int = 1000, drafts: int = 4, rank: int = 0,
    norm: str = "rms", dtype: str = "fp32", head: str = "", bias: bool = False, hot: bool = False,
    scale: float = 1.0, cap: float = 0.0, logits: bool = True, device: str = "cpu",
) -> list[Any]:  # fmt: skip
    """Arguments of ``verify_head``; every other row's last draft token is right."""
    case = Case(dtype, device)
    to_state = case.to_state(rows, hidden, rank, norm)
    heads = case.head(vocabulary, hidden, head, bias)
    names = case.ids(10**6, vocabulary) if hot else None
    drafts_of = case.ids(vocabulary, rows, drafts)
    arguments = [
        *to_state, *heads, names, drafts_of, norm, 1e-5, 1.0, scale, cap, logits,
    ]  # fmt: skip
    token = torch.ops.eepass.verify_head(*arguments)[0]
    drafts_of[::2, -1] = token[::2]
    return arguments


def same(found: Any, expected: Any, rounded: torch.dtype = torch.float32) -> None:
    """Fail unless the outputs agree: floats within the tolerance of their dtype, NaN for NaN."""
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, f"output {index}"
        if not a.is_floating_point():
            assert torch.equal(a, b), f"output {index}: {a} for {b}"
            continue
        # sums of values that were rounded on the way differ by as much
        allowed = max(TOLERANCE[a.dtype], TOLERANCE[rounded])
        a, b = a.float(), b.float()
        finite = b[b.isfinite()]
        largest = float(finite.abs().max()) if finite.numel() else 1.0
        close = torch.isclose(a, b, rtol=0, atol=allowed * max(largest, 1.0), equal_nan=True)
        assert close.all(), f"output {index}: off by {(a - b).abs().max()}"


def same_bits(found: Tensor, expected: Tensor) -> None:
    """Fail unless the tensors are equal; as close as rounding allows where a library adds.

    In this project's own CPU kernels a sum has the same bits for any number of rows and wherever
    its weight row stands.
    """
    if kernel_isa():
        assert torch.equal(found, expected)
    same([found], [expected])


EXITS = {
    "smallest": dict(hidden=63, drafts=1),
    "rows": dict(rows=32, hidden=63, drafts=2, width=7),
    "one-token": dict(rows=2, hidden=63, vocabulary=1),
    "rows-and-drafts": dict(rows=32, hidden=40, drafts=16, rank=1, dtype="fp16", width=1),
    "drafts": dict(rows=2, hidden=576, drafts=16, dtype="bf16"),
    "wide": dict(hidden=4096, dtype="bf16", width=512),
    "wide-translated": dict(hidden=4096, rank=8, drafts=2, dtype="bf16"),
    "translated": dict(rows=3, hidden=576, rank=20, dtype="bf16"),
    "translated-fp16": dict(rows=2, hidden=100, rank=3, dtype="fp16", drafts=16),
    "layer-norm": dict(rows=2, hidden=100, norm="layer", norm_bias=True),
    "layer-norm-translated": dict(rows=2, hidden=150, rank=5, norm="layer", norm_bias=True),
    "gemma": dict(hidden=100, rank=4, offset=1.0, cap=30.0, dtype="bf16"),
    "cohere": dict(hidden=100, norm="layer", scale=0.0625),
    "phi": dict(hidden=100, norm="layer", norm_bias=True, head_bias=True),
    "int8": dict(rows=2, hidden=100, head="int8", head_bias=True, dtype="fp16"),
    "no-norm": dict(hidden=100, norm="none"),
}
VERIFIES = {
    "one-token": dict(vocabulary=1, rows=3),
    "rows": dict(rows=32, dtype="bf16"),
    "wide": dict(hidden=4096, vocabulary=40, dtype="bf16", drafts=16),
    "wide-rows": dict(rows=2, hidden=4096, vocabulary=20, drafts=1),
    "five-rows": dict(rows=5, hidden=576, norm="layer", bias=True),
    "translated": dict(rows=2, hidden=100, rank=6, vocabulary=100, dtype="bf16"),
    "capped": dict(vocabulary=300, cap=5.0, scale=0.5),
    "hot": dict(vocabulary=300, hot=True, logits=False),
    "int8": dict(rows=2, vocabulary=300, head="int8", dtype="fp16"),
}
