"""A decoder's tensors by name, and segments compiled over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eepass.segments import Segment, SplitDecoder

Compiled = Callable[[list[Tensor]], Sequence[Tensor]]
Compile = Callable[..., Compiled]


class Weights:
    """What exits need of a decoder. ``splits`` maps a row count to the decoder split for it;
    ``compile`` turns a graph into a function from the list of its inputs to its outputs."""

    def __init__(
        self, splits: Mapping[int, SplitDecoder], tensors: Mapping[str, Tensor], compile: Compile
    ) -> None:
        self.splits = dict(sorted(splits.items()))
        first = next(iter(self.splits.values()))
        self.num_layers = len(first.layers)
        self.hidden_size = first.hidden_size
        # of hidden states
        self.dtype: torch.dtype = first.boundary.dtype
        self.tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self.compile = compile

    def bind(
        self, segment: Segment, extra: Mapping[str, Tensor], examples: Sequence[Tensor]
    ) -> Any:
        """``segment`` compiled, its parameters bound from the model's and ``extra``'s tensors.

        The result takes the segment's other inputs in order; returns the tuple of its outputs.
        """
        tensors = {**self.tensors, **extra}
        parameters = [tensors[name] for name in segment.parameters]
        compiled = self.compile(segment.graph, segment.structure, [*examples, *parameters])
        return lambda *inputs: compiled([*inputs, *parameters])
