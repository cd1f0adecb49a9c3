"""What a model selects of a long text, as configured: to decode by, or to draft by."""

from __future__ import annotations

from pathlib import Path

from eepass.config import ExitConfig
from eepass.errors import InputError, PassError
from eepass.long.memory import ContextMemory
from eepass.passes.report import PassReport
from eepass.runtime.context.selection import LONG, OwnAttention, Recent, Selection
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.engine.engine import STEP_ROWS

# the layers that select what later ones attend to, in shares of the model's
SELECTS_AT = (0.2, 0.6)


def selection_for(
    decoder: Decoder, config: ExitConfig, folder: Path | None, drafts: bool, report: PassReport
) -> Selection | None:
    """What selects the tokens of a long text that are attended to; ``decoder`` gets layers that
    attend to such. ``folder``: that it was read from, if transformed; ``drafts``: whether exact
    answers may be drafted by it.

    Raises ``InputError`` where the config asks for what the model cannot do.
    """
    slots = LONG * config.context_tokens
    # no text is longer than the cache
    if slots >= decoder.cache_length:
        return None
    exact = config.context == "full"
    if exact and not (drafts and folder is None and _drafting_pays(decoder, config)):
        return None
    if folder is not None:
        raise InputError(
            f"context={config.context!r}: {folder} is a transformed folder, whose layers attend to "
            "all of a text: transform the original instead"
        )
    try:
        _make_layers(decoder, slots, report)
    except PassError as error:
        if exact:
            report.skip("context_drafts", str(error))
            return None
        raise InputError(f"context={config.context!r}: {error}") from error
    if config.context == "recent":
        return Recent(config.context_tokens)
    queries = decoder.context[slots][1].queries
    if exact:
        # one choice is for all layers of the passes to come
        queries = {max(queries): queries[max(queries)]}
    return OwnAttention(config.context_tokens, queries, decoder)


def _make_layers(decoder: Decoder, slots: int, report: PassReport) -> None:
    from eepass.passes.pipeline import context_layers

    if slots not in decoder.context:
        decoder.context[slots] = {
            rows: context_layers(split, slots, SELECTS_AT, report)
            for rows, split in decoder.splits.items()
            if rows <= STEP_ROWS
        }


def _drafting_pays(decoder: Decoder, config: ExitConfig) -> bool:
    """Whether passes over selected tokens may draft for exact answers, and could pay."""
    speculates = config.speculate not in ("off", "lens")
    if not (config.context_drafts and config.guarantee == "exact" and speculates):
        return False
    memory = ContextMemory.of(decoder.splits[min(decoder.splits)])
    return memory.drafting_pays(decoder.cache_length, config.context_tokens)
