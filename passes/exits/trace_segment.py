"""Trace what runs at an exit point, and name the tensors it reads.

An artefact brings ``translator.<layer>.*``, ``predictor.<layer>.*`` and ``hot.ids``; with them come
``hot.head`` and ``hot.bias``, rows of the LM head (of a quantised one a packed weight), and
``predictor.<layer>.threshold``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from eepass.passes.split.split_segments import structure_of
from eepass.private_names import FakeTensorMode
from eepass.segments import HIDDEN, Input, Segment, SplitDecoder

DRAFT = Input("draft", "draft")
PREVIOUS = Input("previous", "previous")
# gives a parameter by name; None for the name "", which stands for a parameter there is not
Get = Callable[[str], Any]


class SegmentTracer:
    """Traces functions of ``rows`` hidden states, their draft tokens and named tensors."""

    def __init__(
        self, split: SplitDecoder, tensors: Mapping[str, Tensor], draft_tokens: int, rows: int
    ) -> None:
        self.tensors = tensors
        self.examples = {
            HIDDEN: torch.zeros(1, rows, split.hidden_size, dtype=split.hidden_example.dtype),
            DRAFT: torch.zeros(rows, draft_tokens, dtype=torch.long),
            PREVIOUS: torch.zeros(rows, draft_tokens),
        }

    @staticmethod
    def translator_names(layer: int) -> list[str]:
        return [f"translator.{layer}.{part}" for part in ("scale", "down", "up")]

    @staticmethod
    def predictor_names(layer: int) -> list[str]:
        return [f"predictor.{layer}.{part}" for part in ("w1", "b1", "w2", "b2")]

    def trace(
        self, function: Callable[..., Any], inputs: tuple[Input, ...], names: Iterable[str]
    ) -> Segment:
        """``function(get, *inputs)`` as a segment of ``inputs`` and the parameters ``names``."""
        # two uses of one tensor are one input
        parameters = list(dict.fromkeys(name for name in names if name))
        count = len(inputs)

        def positional(*values: Tensor) -> Any:
            by_name = dict(zip(parameters, values[count:], strict=True))
            return function(by_name.get, *values[:count])

        mode = FakeTensorMode(allow_non_fake_inputs=True)
        examples = [self.examples[role] for role in inputs]
        examples += [self.tensors[name].data for name in parameters]
        with torch.no_grad():
            graph = make_fx(positional, pre_dispatch=True)(*map(mode.from_tensor, examples))
        roles = (*inputs, *(Input("parameter", name) for name in parameters))
        return Segment(graph, roles, structure_of(graph, roles))
