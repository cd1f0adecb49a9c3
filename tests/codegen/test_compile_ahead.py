"""Code compiled ahead of time calls every operator of ours through a C function."""

import re
from pathlib import Path

import pytest
import torch
from models import tiny_model

from eepass.codegen import compile_ahead
from eepass.codegen.compile_ahead import SHIMS, AheadCompiler
from eepass.runtime.drafting.eagle_head import EagleHead
from eepass.training.draft_head import style_of

FUNCTION = re.compile(r"aoti_torch_cpu_(\w+)\(")
SOURCE = Path(compile_ahead.__file__).parent / "cpu" / "shims.cpp"


def test_every_c_function_is_named_for_the_compiler():
    declared = {FUNCTION.search(line)[1] for lines in SHIMS.values() for line in lines}
    assert declared == set(FUNCTION.findall(SOURCE.read_text()))
    for operator, (line,) in SHIMS.items():
        assert FUNCTION.search(line)[1] == operator.overloadpacket.__name__


@pytest.fixture(scope="module", params=(None, 4))
def head(request):
    """A draft head, plain or in 4 bits, and one whose steps are compiled ahead of time."""
    style = style_of(tiny_model("llama").config, 3)
    torch.manual_seed(0)
    tensors = {
        f"eagle.{name}": torch.randn(shape) * shape[-1] ** -0.5 if len(shape) > 1 else
        torch.rand(shape) + 0.5 for name, shape in style.shapes().items()
    }  # fmt: skip
    embedding = torch.randn(96, style.hidden)
    tensors |= {
        "eagle.rotary": style.rotary, "eagle.features": torch.tensor([1, 2]),
        "eagle.hot.ids": torch.arange(0, 96, 2), "eagle.hot.head": embedding[::2],
    }  # fmt: skip
    return lambda compile: EagleHead(tensors, embedding, compile, bits=lambda: request.param)


def eager(graph, structure, examples, *, logits):
    made = graph.graph
    return lambda arguments: made(*arguments)


@torch.no_grad()
def test_the_draft_head_runs_ahead_of_time(head, tmp_path):
    torch.use_deterministic_algorithms(False)
    plain, ahead = head(eager), head(AheadCompiler(tmp_path / "code"))
    features = torch.randn(7, plain.feature_size)
    for one, other in zip(
        plain.begin([5, 9, 3, 44, 7, 8, 2], features) + plain.further(),
        ahead.begin([5, 9, 3, 44, 7, 8, 2], features) + ahead.further(),
        strict=True,
    ):
        assert one.tokens == other.tokens and one.above == other.above
        found, wanted = torch.tensor(other.scores), torch.tensor(one.scores)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
