"""Rotary frequencies that a GGUF file divides by factors, as llama.cpp does (Llama 3.1 and 3.2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from eepass.checkpoints.gguf_file import GgufFile
from eepass.errors import InputError

FACTORS = "rope_freqs.weight"


def divide_frequencies(model: Any, header: GgufFile) -> None:
    """Divide the model's rotary frequencies by the factors in the file, if it has some.

    transformers leaves them out, and its configuration does not tell either; here it does, under
    ``rope_factors``, so that nothing that is kept for one model is taken for another's. Raises
    ``InputError`` where the model has no such frequencies.
    """
    tensor = next((t for t in header.tensors if t.name == FACTORS), None)
    if tensor is None:
        return
    factors = torch.from_numpy(header.read(tensor).reshape(-1).view(np.float32).copy())
    if not bool((factors > 0).all() and factors.isfinite().all()):
        raise InputError(f"{header.path}: {FACTORS} holds what is no positive number")
    if bool((factors == 1).all()):
        return
    found = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), torch.Tensor)]
    kinds = {getattr(module, "rope_type", None) for module in found}
    if kinds != {"default"} or any(m.inv_freq.shape != factors.shape for m in found):
        raise InputError(f"{header.path}: the model has no place for {FACTORS}")
    for module in found:
        module.inv_freq = module.inv_freq / factors
        module.original_inv_freq = module.inv_freq.clone()
    model.config.rope_factors = factors.tolist()
