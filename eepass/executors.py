"""What decodes for a model: the engine, pass by pass from the host, or captured decode steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import prod
from typing import cast

import torch
from torch import Tensor

from eepass.config import ExitConfig
from eepass.errors import InputError
from eepass.kept.acceptance import KeptAcceptance
from eepass.kept.costs import KeptCosts
from eepass.passes.report import PassReport
from eepass.plan import ExitPlan, ExitSegments
from eepass.planning import DRAFT_HEAD
from eepass.runtime.context.selection import Selection
from eepass.runtime.decoder.costs import PassCosts, logit_noise, pass_seconds
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.drafting.cascade import Cascade, Head
from eepass.runtime.drafting.draft import Draft
from eepass.runtime.drafting.eagle_head import EagleHead
from eepass.runtime.drafting.eagle_tree import EagleTree
from eepass.runtime.drafting.planner import Mode, Planner
from eepass.runtime.drafting.suffix import EarlierTexts, SuffixDraft
from eepass.runtime.engine.engine import Engine
from eepass.runtime.engine.options import Options
from eepass.runtime.engine.sequence import DecodedToken
from eepass.runtime.exits.exits import Exits
from eepass.runtime.exits.scheduler import PredictorSchedule
from eepass.runtime.sampling import GREEDY, Sampling
from eepass.runtime.statistics import Statistics
from eepass.runtime.step.build import Fuse
from eepass.runtime.step.engine import StepEngine
from eepass.runtime.step.exit_points import ExitPoints
from eepass.runtime.step.head_drafts import HeadDrafts
from eepass.runtime.step.launching import Launching, LaunchReport, make_engine
from eepass.runtime.step.layout import StepOptions
from eepass.runtime.step.tree_shape import TreeShape, text_branches

ALWAYS_ACTIVE = 2
# of the draft head's weights
DRAFT_BITS = 4
# rows of the largest pass that is measured, and so of the largest tree of draft tokens
TREE_ROWS = 32
# rows of the largest pass of a captured step, and of one that verifies draft tokens: as many as the
# row kernels of a GPU have in a tile anyway, and fewer where each costs
MOST_STEP_ROWS, TREE_STEP_ROWS = 32, {"cuda": 16, "cpu": 8}
# of those, rows for draft tokens from the text where there is a draft head as well, and its levels
BESIDE, STEP_LEVELS = 4, 3


@dataclass(frozen=True, slots=True)
class ExitParts:
    """The exits of a plan: the tensors they read, and their segments for a number of rows."""

    plan: ExitPlan
    tensors: dict[str, Tensor]
    segments: Callable[[int], ExitSegments]


@dataclass
class Measured:
    """What is measured on a decoder once, when it is first needed; ``kept``: by whoever was first
    to start such a model. Engines share the texts of earlier requests."""

    decoder: Decoder
    kept: KeptCosts
    earlier: EarlierTexts = field(default_factory=EarlierTexts)

    @cached_property
    def pass_seconds(self) -> dict[int, float]:
        rows = [size for size in self.decoder.buckets if size <= TREE_ROWS]
        return self.kept.pass_seconds(partial(pass_seconds, self.decoder, rows, at=256))

    @cached_property
    def logit_noise(self) -> float:
        # rows that go one by one have the same logits wherever they stand
        if self.decoder.splits[1].stepwise:
            return 0.0
        return self.kept.noise(partial(logit_noise, self.decoder))


def engine_for(
    measured: Measured,
    config: ExitConfig,
    parts: ExitParts | None,
    head: Mapping[str, Tensor],
    own_draft: Head | None,
    trace: bool,
    packs: Callable[[], bool],
    learned: KeptAcceptance,
    hits: Sequence[float] = (),
    selection: Selection | None = None,
) -> Engine:
    """The engine that decodes as ``config`` says; its first sequence compiles and measures.

    ``head``: the tensors of a trained draft head, none without one. ``own_draft``: of another
    model, if there is one. ``trace``: whether that has
    still to be traced, or was compiled ahead of time. ``packs``: whether there are kernels for
    packed weights, asked when a head is first run. ``hits``: how often it was right at each further
    draft token, when it was trained. ``selection``: what is attended to in long texts.
    """
    decoder = measured.decoder
    earlier = measured.earlier if config.remember else None
    named = parts.plan.draft_tokens if parts is not None else 0
    draft = _draft_for(decoder, config, head, named, own_draft, trace, earlier, packs)
    exits = schedule = None
    if parts is not None:
        exits = Exits(decoder, parts.plan, parts.segments, parts.tensors)
        if config.schedule:
            schedule = PredictorSchedule(parts.plan.ranking, ALWAYS_ACTIVE)
    modes = cast(tuple[Mode, ...], config.modes)
    options = Options(config.guarantee, config.kv, config.pending, modes)

    def planner() -> Planner:
        costs = PassCosts(measured.pass_seconds)
        if draft is None:
            made = Planner(costs)
        else:
            expected = draft.expected
            if hits:
                expected = 1 + sum(prod(hits[: depth + 1]) for depth in range(len(hits)))
            made = Planner(costs, draft.call_seconds(), expected, draft_calls=draft.calls)
        made.acceptance.observed, figures = learned.recall()
        made.recall(figures)
        return made

    def ended(planner: Planner, tokens: Sequence[int]) -> None:
        learned.keep(planner.passes, planner.acceptance.observed, planner.learned())
        if earlier is not None:
            earlier.add(tokens)

    return Engine(
        decoder, exits, schedule, draft, options,
        planner if len(modes) > 1 or draft else None, lambda: measured.logit_noise,
        ended if draft is not None else None, selection,
    )  # fmt: skip


def _draft_for(
    decoder: Decoder,
    config: ExitConfig,
    head: Mapping[str, Tensor],
    named: int,
    own_draft: Head | None,
    trace: bool,
    earlier: EarlierTexts | None,
    packs: Callable[[], bool],
) -> Draft | None:
    source, text = config.speculate, SuffixDraft(earlier)
    if source == "model":
        assert own_draft is not None
        return Cascade(own_draft, text)
    if source == "suffix" or (source == "cascade" and DRAFT_HEAD not in head):
        return text
    if source in ("eagle", "cascade") or config.draft == "eagle":
        eagle, norm = _eagle_head(decoder, head, trace, packs), decoder.normed
        if source in ("eagle", "cascade"):
            return Cascade(EagleTree(eagle, norm), text if source == "cascade" else None)
        # candidates of early exits
        return EagleTree(eagle, norm, named)
    return None


def drafts_in_a_step(
    decoder: Decoder,
    config: ExitConfig,
    head: Mapping[str, Tensor],
    trace: bool,
    packs: Callable[[], bool],
) -> tuple[TreeShape, HeadDrafts | None]:
    """Which draft tokens a captured step verifies, and the draft head that names some of them;
    arguments as for ``engine_for``."""
    most = TREE_STEP_ROWS[decoder.device.type]
    drafts = max(size for size in decoder.buckets if size <= most) - 1
    if config.speculate == "suffix" or DRAFT_HEAD not in head:
        return TreeShape(text_branches(drafts)), None
    beside = min(BESIDE, drafts // 2) if config.speculate == "cascade" else 0
    shape = TreeShape((beside,) * bool(beside), drafts - beside, STEP_LEVELS)
    eagle = _eagle_head(decoder, head, trace, packs)
    return shape, HeadDrafts(eagle, decoder.normed, decoder.compile_captured)


def _eagle_head(
    decoder: Decoder, head: Mapping[str, Tensor], trace: bool, packs: Callable[[], bool]
) -> EagleHead:
    return EagleHead(
        head,
        token_embedding(decoder),
        decoder.compile,
        trace,
        lambda: DRAFT_BITS if packs() else None,
    )


def token_embedding(decoder: Decoder) -> Tensor:
    """The embedding [V, H] of tokens."""
    for role in decoder.splits[1].embed.inputs:
        if role.kind == "parameter" and decoder.tensors[role.name].ndim == 2:
            return decoder.tensors[role.name]
    raise InputError("the draft needs the token embedding, and none was found")


class CapturedSteps:
    """Decodes with steps captured as a whole, at first use; answers to what an ``Engine`` does.

    A token that exits early is final, unless the config is exact, which wants draft tokens: then
    it is one of those for the next pass.
    Sampling wants another step than greedy decoding, which need not sort logits; it is captured
    when it is first asked for.
    """

    def __init__(
        self,
        decoder: Decoder,
        config: ExitConfig,
        parts: ExitParts | None,
        launching: Launching,
        stop: frozenset[int],
        force: int | None = None,
        fuse: Callable[[], Fuse | None] = lambda: None,
        debug: bool = False,
        drafts: tuple[TreeShape, HeadDrafts | None] = (TreeShape(), None),
    ) -> None:
        """``parts``: exits, None for a dense or forced step. ``fuse``: what compiles the updates of
        a step's state, if anything does. ``debug``: assert at each step that nothing has moved
        since it was captured. ``drafts``: the draft tokens that a step verifies, and the head that
        names them."""
        tree, self._head = drafts
        self._options = StepOptions(
            kv=config.kv,
            pending=config.pending,
            buckets=tuple(size for size in decoder.buckets if size <= MOST_STEP_ROWS),
            ranking=parts.plan.ranking if parts is not None and config.schedule else (),
            always=ALWAYS_ACTIVE,
            force=force,
            stop=tuple(sorted(stop)),
            tree=tree if tree.rows > 1 else None,
            exact=config.guarantee == "exact",
        )
        self.decoder, self._launching = decoder, launching
        self._parts, self._fuse, self._debug = parts, fuse, debug
        self._steps: StepEngine | None = None
        self._report: Callable[[], LaunchReport] | None = None
        self._notes: tuple[str, ...] = ()

    @property
    def steps(self) -> StepEngine:
        """The captured step and its loop."""
        return self._captured(draws=False)

    def generate(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        stop: frozenset[int] = frozenset(),
        sampling: Sampling = GREEDY,
    ) -> Iterator[DecodedToken]:
        """Tokens after ``ids``; one of ``stop``, or of the model's own end tokens, is the last."""
        steps = self._captured(draws=not sampling.greedy)
        for token in steps.generate(ids, max_new_tokens, sampling):
            yield token
            if token.token in stop:
                return

    def follow(self, ids: Sequence[int], answer: Sequence[int]) -> list[DecodedToken]:
        """Teacher forcing: what would follow each token of ``answer`` but the last, given it."""
        return self.steps.follow(ids, answer)

    @property
    def statistics(self) -> Statistics:
        return self.steps.statistics

    @statistics.setter
    def statistics(self, fresh: Statistics) -> None:
        self.steps.statistics = fresh

    @property
    def launch_report(self) -> LaunchReport:
        """How steps are launched, and what they cost besides."""
        self._captured(draws=False)
        assert self._report is not None
        report = self._report()
        report.missing = (*report.missing, *self._notes)
        return report

    def close(self) -> None:
        """Give back what was captured; it is captured again when it is next used."""
        if self._steps is not None:
            self._steps.close()
        self._steps, self._report = None, None

    def _captured(self, draws: bool) -> StepEngine:
        # a step that draws decodes greedily too
        if self._steps is None or (draws and not self._steps.draws):
            self.close()
            exits = None if self._parts is None else self._exit_points(self._parts, draws)
            options = replace(self._options, draws=draws)
            self._steps, self._report = make_engine(
                self.decoder, exits, options, self._launching, self._fuse(), self._debug,
                self._head,
            )  # fmt: skip
        return self._steps

    def _exit_points(self, parts: ExitParts, draws: bool) -> ExitPoints:
        """Exit points as kernels where they can be; their differences from the segments are noted.

        Kernels keep logits to themselves, and sampling needs them.
        """
        self._notes = ()
        decoder, plan, tensors = self.decoder, parts.plan, parts.tensors
        with torch.no_grad(), torch.device(decoder.device):
            rows = self._options.tree.rows if self._options.tree is not None else 1
            segments = parts.segments(rows)
            plain = ExitPoints(decoder, plan, segments, tensors, rows=rows)
            if decoder.device.type != "cuda" or draws:
                return plain
            from eepass.passes.pipeline import fused_exits

            report = PassReport()
            every = {**decoder.tensors, **tensors}
            fused = fused_exits(decoder.splits[1], plan, every, report, rows)
            reasons = [reason for _, reason in report.skipped]
            if fused is not None:
                kernels = ExitPoints(decoder, plan, segments, tensors, fused, rows)
                reason = kernels.differ_from(plain)
                if not reason:
                    return kernels
                reasons = [reason]
        self._notes = tuple(f"kernels of exit points: {reason}" for reason in reasons)
        return plain
