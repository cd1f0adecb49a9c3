"""The Triton kernels on a GPU: the interpreter's cases, and what only a GPU can show."""

import pytest
import torch
from kernel_cases import (
    EXITS,
    VERIFIES,
    Case,
    exit_case,
    same,
    verify_case,
)

from eepass.masks import first_seen
from eepass.ops import fused
from eepass.ops import packed as reference
from eepass.ops.packed import INT8, UNROUNDED
from eepass.ops.packing import form_number
from eepass.ops.rows import attend_spans

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module", autouse=True)
def kernels():
    from eepass.codegen.kernels.register import register_kernels

    register_kernels()


@pytest.mark.parametrize("case", EXITS.values(), ids=EXITS.keys())
def test_exit_predictor(case):
    arguments = exit_case(**case, device="cuda")
    same(torch.ops.eepass.exit_predictor(*arguments), fused.exit_predictor(*arguments))


@pytest.mark.parametrize("case", VERIFIES.values(), ids=VERIFIES.keys())
def test_verify_head(case):
    arguments = verify_case(**case, device="cuda")
    rounded = Case(case.get("dtype", "fp32")).dtype
    same(torch.ops.eepass.verify_head(*arguments), fused.verify_head(*arguments), rounded)


@pytest.mark.parametrize("rows", (1, 4, 32))
@pytest.mark.parametrize("vocabulary", (32_000, 128_256, 262_144))
def test_verify_head_of_large_models(rows, vocabulary):
    arguments = verify_case(rows, 512, vocabulary, dtype="bf16", device="cuda")
    token, known, logits = torch.ops.eepass.verify_head(*arguments)
    expected = fused.verify_head(*arguments)
    # argmax of the kernel's own logits: sums in another order may swap near ties
    assert torch.equal(token, logits.argmax(-1))
    same((logits,), expected[2:], torch.bfloat16)
    assert torch.equal(known, (token[:, None] == arguments[10]).any(-1))


@pytest.mark.parametrize("rows", (1, 9))
def test_draft_topk(rows):
    case = Case("bf16", "cuda")
    arguments = [case.random(rows, 512), *case.head(8192, 512), None, 32, 1.0, 0.0]
    scores, ids = torch.ops.eepass.draft_topk(*arguments)
    expected, _ = fused.draft_topk(*arguments)
    same((scores,), (expected,))
    logits = arguments[0].float() @ arguments[1].float().T
    same((logits.gather(-1, ids).log_softmax(-1),), (scores.log_softmax(-1),))


@pytest.mark.parametrize(
    ("outputs", "inputs"), ((1536, 4608), (2048, 2048), (4608, 4608), (33, 200))
)
def test_linear_rows(outputs, inputs):
    """Right, and with the same bits for any number of rows, launch after launch."""
    case = Case("bf16", "cuda")
    x, weight = case.random(16, inputs), case.random(outputs, inputs, scale=inputs**-0.5)
    (whole,) = torch.ops.eepass.linear_rows(x, [weight], [None])
    same((whole,), (x.float() @ weight.float().T,), torch.bfloat16)
    for rows in (1, 2, 5, 16):
        (part,) = torch.ops.eepass.linear_rows(x[-rows:], [weight], [None])
        assert torch.equal(part, whole[-rows:])


@pytest.mark.parametrize("end", (40, 1000, 8000))
@pytest.mark.parametrize("window", (None, 300))
def test_attend_spans(end, window):
    """A tree of 16 rows behind a text; the same bits for some of them."""
    case = Case("bf16", "cuda")
    rows = torch.arange(16, device="cuda")
    spans = torch.stack([first_seen(end + rows, window), rows * 0 + end, (2 << rows) - 1], 1)
    q = case.random(16, 9, 64).transpose(0, 1)
    keys, values = case.random(3, 8192, 64), case.random(3, 8192, 64)
    whole = torch.ops.eepass.attend_spans(q, keys, values, spans, 0.125)
    same((whole,), (attend_spans(q, keys, values, spans, 0.125),))
    for begin, last in ((0, 1), (15, 16), (3, 9)):
        given = (q[:, begin:last], keys, values, spans[begin:last], 0.125)
        assert torch.equal(torch.ops.eepass.attend_spans(*given), whole[:, begin:last])


@pytest.mark.parametrize(("kind", "group"), (("u4", 32), ("u4", 128), ("u8", 0), ("q8_0", 0)))
def test_packed_rows(kind, group):
    form, outputs, inputs = form_number(kind, group), 1536, 4608
    case = Case("bf16", "cuda")
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
    if kind[0] == "u":
        parts = inputs // group if group else 1
        numbers = [torch.rand(outputs, parts) / 64 for _ in range(2)]
        packed = torch.ops.eepass.pack_groups(codes, *numbers, form)
    else:
        # each 32 inputs: 16 scales of float16, then codes
        scales = torch.full((outputs // 16, inputs // 32, 16), 0.01, dtype=torch.float16)
        parts = (scales.view(torch.uint8), codes.view(outputs // 16, inputs // 32, 512))
        packed = torch.cat(parts, -1).flatten(1)
    x, packed = case.random(40, inputs), packed.cuda()
    for activations in (INT8, UNROUNDED):
        given = (packed, form, outputs, None, activations)
        whole = torch.ops.eepass.packed_logits(x, *given)
        same((whole,), (reference.packed_logits(x, *given),), torch.bfloat16)
        for rows in (1, 5, 17):
            part = torch.ops.eepass.packed_logits(x[:rows], *given)
            assert torch.equal(part, whole[:rows])


@pytest.mark.parametrize("rank", (0, 128), ids=("lens", "translated"))
def test_every_replay_of_a_graph_says_the_same(rank):
    """Counters must be ready each time, and the last program to arrive see all others' work."""
    arguments = exit_case(rows=4, hidden=4096, rank=rank, dtype="bf16", device="cuda")
    verify = verify_case(4, 256, 32_000, dtype="bf16", device="cuda")

    def step():
        return *torch.ops.eepass.exit_predictor(*arguments), *torch.ops.eepass.verify_head(*verify)

    expected = [x.clone() for x in step()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for _ in range(300):
        for output in found:
            output.zero_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_flag_follows_the_threshold_without_a_new_graph():
    arguments = exit_case(hidden=512, dtype="bf16", device="cuda")
    torch.ops.eepass.exit_predictor(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        *_, exits = torch.ops.eepass.exit_predictor(*arguments)
    for threshold, leaves in ((-1.0, True), (2.0, False), (-1.0, True)):
        arguments[15].fill_(threshold)
        graph.replay()
        assert exits.item() == leaves
