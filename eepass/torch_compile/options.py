"""The options of ``torch.compile(model, backend="specee", options={…})``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from eepass.config import ExitConfig
from eepass.errors import InputError
from eepass.runtime.statistics import Statistics


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """The options of the backend ``specee``.

    ``artifact``: folder written by ``eepass train``; by default the one in ``eepass/`` beside the
    checkpoint. ``threshold``, ``target_agreement``, ``schedule``, ``preset``, ``draft``: as in
    ``ExitConfig``. ``kv``: ``defer`` projects the keys and values an exit skipped and replaces them
    by the true ones when a later token goes deeper; ``propagate`` keeps the projected ones.
    ``logits``: ``full``, or ``hot`` to skip the cold rows of the LM head after an exit (their
    logits are −inf). ``inner_backend``: what compiles the segments, and all that is no decode step.
    ``stats``: a function called after each step with the ``Statistics`` of its cache.
    """

    artifact: str | Path | None = None
    preset: str = "default"
    guarantee: Literal["approximate"] = "approximate"
    kv: Literal["defer", "propagate"] = "defer"
    threshold: float | None = None
    target_agreement: float = 0.98
    draft: Literal["lens"] = "lens"
    schedule: bool = True
    logits: Literal["full", "hot"] = "full"
    inner_backend: str = "inductor"
    stats: Callable[[Statistics], None] | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> BackendOptions:
        """``values`` checked; raises ``InputError`` naming what is wrong and what is known."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise InputError(
                f"backend 'specee': unknown option {', '.join(map(str, unknown))}; "
                f"known: {', '.join(known)}"
            )
        options = cls(**values)
        if options.guarantee == "exact":
            raise InputError(
                "backend 'specee': guarantee='exact' is not possible in a single forward call, "
                "which cannot roll a token back; use "
                "model.generate(..., custom_generate=eepass.generate)"
            )
        for name, choices in (
            ("guarantee", ("approximate",)),
            ("kv", ("defer", "propagate")),
            ("logits", ("full", "hot")),
        ):
            if (value := getattr(options, name)) not in choices:
                raise InputError(
                    f"backend 'specee': {name}={value!r}: must be one of {', '.join(choices)}"
                )
        if options.draft != "lens":
            raise InputError(
                f"backend 'specee': draft={options.draft!r}: must be lens; the other drafts "
                "need all tokens of the sequence, and a forward call gets one "
                "(custom_generate=eepass.generate has them)"
            )
        if options.stats is not None and not callable(options.stats):
            raise InputError("backend 'specee': stats must be a function of Statistics")
        options.config  # noqa: B018  raises for options that do not fit together
        return options

    @property
    def config(self) -> ExitConfig:
        """The exits' configuration; raises ``InputError`` for options that do not fit together."""
        try:
            preset = ExitConfig.preset(self.preset)
            if preset.draft != "lens":
                raise InputError(
                    f"backend 'specee': preset={self.preset!r} drafts with the trained head, which "
                    "needs the hidden states of all tokens; a forward call gets one"
                )
            config = preset.approximate(self.target_agreement)
            return replace(config, kv=self.kv, threshold=self.threshold, schedule=self.schedule)
        except InputError:
            raise
        except (TypeError, ValueError) as error:
            raise InputError(f"backend 'specee': {error}") from error
