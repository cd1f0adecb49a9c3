"""Give each layer the slots its rows are written to, in place of its cache's length.

    before   at = arange(R) + length; keys.index_copy_(2, at, k); length.add_(R)
    after    keys.index_copy_(2, slots, k)

So the engine owns the lengths, and the rows of one pass need not be neighbours in the cache.
"""

from __future__ import annotations

import torch

from eepass.errors import PassError
from eepass.passes.graph_walk import replace_node
from eepass.passes.report import PassReport
from eepass.segments import DecoderGraph

aten = torch.ops.aten


def replace_lengths(decoder: DecoderGraph, report: PassReport) -> DecoderGraph:
    for placeholder, role in decoder.roles.items():
        if role.kind != "slots":
            continue
        slots = None
        for user in list(placeholder.users):
            if user.target is aten.add_.Tensor and not user.users:
                user.graph.erase_node(user)
            elif user.target is aten.add.Tensor and tuple(user.meta["val"].shape) == (
                decoder.rows,
            ):
                # arange(R) + length, which is what the input stands for from here on
                slots = user.meta["val"]
                replace_node(user, placeholder)
            else:
                raise PassError(f"layer {role.layer} uses its KV length in {user.target}")
        if slots is None:
            raise PassError(f"layer {role.layer} does not write its rows where its KV length says")
        placeholder.meta["val"] = slots
        report.rewritten += 1
    return decoder
