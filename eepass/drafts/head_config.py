"""What the ``config.json`` of an EAGLE-3 checkpoint says, in the flat form and that of speculators.

The flat form is the one of the method's authors, which vLLM and SGLang read; the other one is that
of vLLM's library ``speculators``, whose decoder layer is described in an object of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eepass.errors import InputError
from eepass.reading import is_whole_number
from eepass.runtime.drafting.eagle_form import WINDOW

ARCHITECTURE, SPECULATOR = "LlamaForCausalLMEagle3", "Eagle3DraftModel"
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
SLIDING, FULL = "sliding_attention", "full_attention"
# what other values of these mean is not in the head's equations
FIXED = {
    "num_hidden_layers": 1, "model_type": "llama", "hidden_act": "silu", "attention_bias": False,
    "mlp_bias": False, "bias": False, "quantization_config": None,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """Sizes and form of a head. ``layers``: after so many of the model's layers its features are
    taken, the last one before the final norm; ``rope``: ``rope_parameters`` of transformers;
    ``window``: 0 where attention sees all; ``positions``: what the model knows of them."""

    hidden: int
    target_hidden: int
    inner: int
    heads: int
    groups: int
    head_width: int
    vocabulary: int
    draft_vocabulary: int
    positions: int
    layers: tuple[int, ...]
    rope: Mapping[str, Any]
    epsilon: float
    norm_before_residual: bool
    norm_output: bool
    norm_before_fc: bool
    fc_norm: bool
    window: int

    def flat(self, dtype: str) -> dict[str, Any]:
        """``config.json`` in the flat form."""
        return {
            "architectures": [ARCHITECTURE],
            **self._layer(),
            **self._head(),
            "num_aux_hidden_states": len(self.layers),
            "eagle_config": {"use_aux_hidden_state": True, LAYER_IDS: list(self.layers)},
            "dtype": dtype,
        }

    def speculators(
        self, dtype: str, verifier: str, architectures: list[str], steps: int
    ) -> dict[str, Any]:
        """``config.json`` as the library ``speculators`` has it; ``verifier``: the model's name and
        its ``architectures``; ``steps``: draft tokens in a row."""
        return {
            "speculators_model_type": "eagle3",
            "architectures": [SPECULATOR],
            "transformer_layer_config": self._layer(),
            **self._head(),
            "embed_requires_grad": False,
            "speculators_config": {
                "algorithm": "eagle3",
                "proposal_methods": [{
                    "proposal_type": "greedy", "speculative_tokens": steps,
                    "verifier_accept_k": 1, "accept_tolerance": 0.0,
                }],
                "default_proposal_method": "greedy",
                "verifier": {"name_or_path": verifier, "architectures": architectures},
            },
            "dtype": dtype,
        }  # fmt: skip

    def _layer(self) -> dict[str, Any]:
        windows = {"layer_types": [SLIDING], "sliding_window": self.window} if self.window else {}
        return {
            "model_type": "llama",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": 1,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "head_dim": self.head_width,
            "hidden_act": "silu",
            "max_position_embeddings": self.positions,
            "rms_norm_eps": self.epsilon,
            # before transformers 5 it had a place of its own
            "rope_theta": self.rope["rope_theta"],
            "rope_parameters": dict(self.rope),
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            **windows,
        }

    def _head(self) -> dict[str, Any]:
        target = {"target_hidden_size": self.target_hidden}
        return {
            "draft_vocab_size": self.draft_vocabulary,
            **(target if self.target_hidden != self.hidden else {}),
            "norm_before_residual": self.norm_before_residual,
            "norm_before_fc": self.norm_before_fc,
            "fc_norm": self.fc_norm,
            "norm_output": self.norm_output,
            LAYER_IDS: list(self.layers),
        }


def read_config(values: Any, depth: int, layers: tuple[int, ...] | None = None) -> HeadConfig:
    """The configuration in ``values`` from JSON, of a head for a model of ``depth`` layers;
    ``layers``: instead of those it names.

    Raises ``InputError`` naming the field that is missing or that the head cannot hold.
    """
    if not isinstance(values, dict):
        raise InputError("no JSON object")
    kind = values.get("speculators_model_type")
    if kind not in (None, "eagle3"):
        raise InputError(f"speculators_model_type is {kind!r}: eagle3 heads are read")
    inner = values if kind is None else values.get("transformer_layer_config")
    if not isinstance(inner, dict):
        raise InputError("transformer_layer_config is missing or no object")
    eagle = values.get("eagle_config") or {}
    everything = {**inner, **values, **(eagle if isinstance(eagle, dict) else {})}
    everything["model_type"] = inner.get("model_type", "llama")
    for name, wanted in FIXED.items():
        if everything.get(name, wanted) != wanted:
            raise InputError(f"{name} is {everything[name]!r}: heads with {wanted!r} are read")
    if not everything.get("use_aux_hidden_state", True) or everything.get("parallel_drafting"):
        raise InputError("no EAGLE-3 head: it drafts from the last hidden state alone, or at once")
    found = _Fields(everything)
    hidden, heads = found.size("hidden_size"), found.size("num_attention_heads")
    return HeadConfig(
        hidden=hidden,
        target_hidden=found.size("target_hidden_size", hidden),
        inner=found.size("intermediate_size"),
        heads=heads,
        groups=found.size("num_key_value_heads", heads),
        head_width=found.size("head_dim", hidden // heads),
        vocabulary=found.size("vocab_size"),
        draft_vocabulary=found.size("draft_vocab_size", found.size("vocab_size")),
        positions=found.size("max_position_embeddings", 2048),
        layers=layers or found.layers(depth),
        rope=found.rope(),
        epsilon=found.epsilon(),
        # speculators' heads are read so by vLLM where they do not say it
        norm_before_residual=found.flag("norm_before_residual", kind is not None),
        norm_output=found.flag("norm_output"),
        norm_before_fc=found.flag("norm_before_fc"),
        fc_norm=found.flag("fc_norm"),
        window=found.window(),
    )


@dataclass(frozen=True, slots=True)
class _Fields:
    values: Mapping[str, Any]

    def size(self, name: str, default: int | None = None) -> int:
        value: Any = self.values.get(name)
        value = default if value is None else value
        if not is_whole_number(value) or value < 1:
            raise InputError(f"{name} is {value!r}, not a size")
        return int(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise InputError(f"{name} is {value!r}, not true or false")
        return value

    def layers(self, depth: int) -> tuple[int, ...]:
        """After so many layers; where it does not say it, as EAGLE-3's authors have it."""
        ids = self.values.get(LAYER_IDS)
        if ids is None:
            ids = [2, depth // 2, depth - 3]
        if not isinstance(ids, list) or not all(map(is_whole_number, ids)):
            raise InputError(f"{LAYER_IDS} is {ids!r}, not a list of layers")
        refuse_layers(ids, depth)
        return tuple(ids)

    def rope(self) -> dict[str, Any]:
        """``rope_parameters``, from where transformers 4 had them too."""
        given = self.values.get("rope_parameters") or self.values.get("rope_scaling") or {}
        if not isinstance(given, dict):
            raise InputError(f"rope_parameters is {given!r}, no object")
        given = dict(given)
        kind = given.pop("type", None)
        theta = given.get("rope_theta", self.values.get("rope_theta") or 10000.0)
        if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not theta > 1:
            raise InputError(f"rope_theta is {theta!r}, not above 1")
        return {"rope_type": kind or "default", **given, "rope_theta": float(theta)}

    def epsilon(self) -> float:
        value = self.values.get("rms_norm_eps", 1e-6)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
            raise InputError(f"rms_norm_eps is {value!r}, not between 0 and 1")
        return float(value)

    def window(self) -> int:
        """Of the one layer's attention; 0 where it sees all."""
        types = self.values.get("layer_types") or [FULL]
        if types == [FULL]:
            return 0
        if types != [SLIDING] or self.values.get("sliding_window") != WINDOW:
            raise InputError(
                f"layer_types is {types!r} with sliding_window "
                f"{self.values.get('sliding_window')!r}: heads that see all, or {WINDOW} tokens, "
                "are read"
            )
        return WINDOW


def refuse_layers(ids: list[int], depth: int) -> None:
    """Raise ``InputError`` for layers that are not in the order in which servers hand their hidden
    states over, or not of a model of ``depth`` layers."""
    if not ids or sorted(set(ids)) != ids or ids[0] < 1 or ids[-1] > depth:
        raise InputError(f"{LAYER_IDS} is {ids}, not rising from 1 to {depth}")
