"""What a draft head must be to be one: EAGLE-3's, in one of its forms."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from eepass.checkpoints.tensor_checks import ids_of, match
from eepass.errors import InputError

# shapes by letter: E is the head's width, F its features side by side, A and G its queries and
# keys, I its width inside, R half the width of a head, V and N tokens of the model and of its own
WEIGHTS = {
    "fc": "EF", "q": "A2", "k": "G2", "v": "G2", "o": "EA", "gate": "IE", "up": "IE", "down": "EI",
    "token_norm": "E", "hidden_norm": "E", "mlp_norm": "E", "norm": "E", "rotary": "R",
}  # fmt: skip
OPTIONAL = {
    "fc_norm": "F", "input_norm": "F", "embedding": "VE", "hot.head": "NE", "epsilon": "1",
}  # fmt: skip
# of one element, not of floats
FLAGS = ("reads_z", "norm_before_residual", "norm_output", "window")


def refuse_bad_draft_head(
    tensors: Mapping[str, Tensor], hidden: int, layers: int, vocabulary: int
) -> None:
    """Raise ``InputError`` naming the first of the tensors ``eagle.*`` that is missing or of
    another shape or range than a head for a model of these sizes has."""
    if "eagle.mix" in tensors:
        raise InputError("its draft head is of a kind that is no longer read")
    for flag in FLAGS:
        found = tensors.get(f"eagle.{flag}")
        if found is not None and (found.numel() != 1 or found.is_floating_point()):
            raise InputError(f"eagle.{flag} is {list(found.shape)}, not one number or yes or no")
    features = ids_of(tensors, "eagle.features", layers + 1)
    count = len(features) + bool(tensors.get("eagle.reads_z", True))
    own = {"F": count * hidden, "V": vocabulary, "1": 1}
    if "eagle.embedding" not in tensors:
        own["E"] = hidden
    elif tensors["eagle.embedding"].ndim == 2:
        own["E"] = tensors["eagle.embedding"].shape[1]
    own["2"] = 2 * own.get("E", 0)
    if "eagle.hot.ids" in tensors:
        own["N"] = len(ids_of(tensors, "eagle.hot.ids", vocabulary))
    given = {name: letters for name, letters in OPTIONAL.items() if f"eagle.{name}" in tensors}
    match(tensors, "eagle.", WEIGHTS | given, own)
    if "fc_norm" in given and "input_norm" in given:
        raise InputError("eagle.fc_norm, eagle.input_norm: features are normed one way")
    if "epsilon" in given and not 0 < float(tensors["eagle.epsilon"]) < math.inf:
        raise InputError(f"eagle.epsilon is {float(tensors['eagle.epsilon'])}, not above 0")
    width = 2 * own["R"]
    if own["A"] % width or own["G"] % width or own["A"] % own["G"]:
        raise InputError(
            f"eagle.q, eagle.k: {own['A']} and {own['G']} rows are no heads of {width}"
        )
