"""The decode loop: draft tokens, one forward pass over them, verification, commit or roll back.

A token that exits early is *pending*: the deeper layers have not run it. Its hidden state is kept,
and the next pass that goes deeper takes it along as an extra row (*catch-up*), so that every layer
runs every token in order and no weight is read twice. With guarantee ``exact`` such a token is not
confirmed until the last layer has computed the next token of the one before it; a wrong one is
rolled back with everything after it, and streams only ever see confirmed tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from time import perf_counter

from torch import Tensor

from eepass.errors import EngineError
from eepass.runtime.context.drafts import MOST_ROWS, ContextDrafts
from eepass.runtime.context.selection import Selection
from eepass.runtime.decoder.costs import PassCosts
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.drafting.draft import Draft
from eepass.runtime.drafting.planner import Planner
from eepass.runtime.engine.batch_scheduler import BatchScheduler
from eepass.runtime.engine.commit import commit
from eepass.runtime.engine.forward_pass import ForwardPass
from eepass.runtime.engine.options import Options
from eepass.runtime.engine.placement import Placement
from eepass.runtime.engine.prefill import OnLayer, run_chunk
from eepass.runtime.engine.recorder import Recorder
from eepass.runtime.engine.row_context import RowContext
from eepass.runtime.engine.scheduled_sequence import ScheduledSequence
from eepass.runtime.engine.sequence import DecodedToken, Sequence
from eepass.runtime.engine.verifier import Verifier
from eepass.runtime.exits.exits import Exits
from eepass.runtime.exits.scheduler import PredictorSchedule
from eepass.runtime.sampling import GREEDY, Sampling
from eepass.runtime.statistics import Statistics

# rows of a decode pass at most; larger row counts are for prompts and for catching up
STEP_ROWS = 32


class Engine:
    """Decodes sequences with a ``Decoder``; without ``exits`` and ``draft`` it is dense."""

    def __init__(
        self,
        decoder: Decoder,
        exits: Exits | None = None,
        schedule: PredictorSchedule | None = None,
        draft: Draft | None = None,
        options: Options | None = None,
        planner: Callable[[], Planner] | None = None,
        noise: Callable[[], float] | None = None,
        ended: Callable[[Planner, SequenceOf[int]], None] | None = None,
        selection: Selection | None = None,
    ) -> None:
        """``planner`` and ``noise`` measure, in an empty cache, before the first sequence;
        ``ended`` is called with the tokens of each sequence that ends. ``selection``: what
        tokens attend to in long texts; where answers are exact, in passes that draft them."""
        self.decoder, self.exits, self.selection = decoder, exits, selection
        self.schedule, self.draft = schedule, draft
        if options is None:
            options = Options(modes=("exits",) if exits is not None else ("dense",))
        self.options = options
        sizes = [size for size in decoder.buckets if size <= STEP_ROWS]
        self.step_rows = max(sizes)
        self.pending_limit = min(options.pending_limit, self.step_rows - 1)
        self.planner = Planner(PassCosts(dict.fromkeys(sizes, 1.0)), modes=options.modes)
        self._to_measure, self._ended = (planner, noise), ended
        # a planner that nothing was measured for takes all passes to cost the same
        self._observes = False
        # for how many sequences together everything is compiled
        self._prepared = 0
        self.statistics = Statistics(decoder.num_layers)
        self.verifier = Verifier(decoder.num_layers, options.guarantee == "exact")
        self.scheduler = BatchScheduler(
            decoder, exits, self.verifier, options.kv_policy, self.pending_limit
        )
        self.context_drafts: ContextDrafts | None = None
        if self.verifier.exact and selection is not None:
            self.context_drafts = ContextDrafts(selection, self.planner, self.step_rows)
        # what generated tokens are of goes by what they attended to
        complete = options.kv_policy == "defer" and (selection is None or self.verifier.exact)
        layers = draft.feature_layers if draft is not None else None
        self.placement = Placement(decoder, complete, layers)
        # those whose prompts have been run
        self.sequences: list[Sequence] = []
        # of a dense engine; whoever sets it takes what it keeps
        self.recorder: Recorder | None = None

    def measure(self) -> None:
        """Measure what has not been measured yet, if the cache holds no sequence."""
        if not self.decoder.kv.unused:
            return
        planner, noise = self._to_measure
        if planner is not None or noise is not None:
            # measuring writes to slots that no sequence has
            self.decoder.kv.regions.forget()
        if planner is not None:
            self.planner, self._observes = planner(), True
            self.planner.modes = self.options.modes
            if self.context_drafts is not None:
                self.context_drafts.begin(planner(), self.planner)
        if noise is not None and self.verifier.exact:
            self.verifier.noise = noise()
        self._to_measure = (None, None)

    def start(
        self,
        ids: SequenceOf[int],
        max_new_tokens: int = 1 << 30,
        stop: frozenset[int] = frozenset(),
        sampling: Sampling = GREEDY,
        capacity: int | None = None,
        on_layer: OnLayer | None = None,
    ) -> Sequence:
        """Add a sequence, which gets ``capacity`` slots (by default as many as a sequence may
        have), run its prompt and generate its first token.

        Raises ``EngineError`` for an empty prompt, one that does not fit, or where no slots are
        free.
        """
        sequence = self.admit(ids, max_new_tokens, stop, sampling, capacity)
        try:
            while not self.run_prompt(sequence, on_layer=on_layer):
                pass
        except BaseException:
            # also on Ctrl-C: the caller has no sequence that it could end
            self.end(sequence)
            raise
        return sequence

    def admit(
        self,
        ids: SequenceOf[int],
        max_new_tokens: int = 1 << 30,
        stop: frozenset[int] = frozenset(),
        sampling: Sampling = GREEDY,
        capacity: int | None = None,
        slots: int | None = None,
        shares: bool = False,
    ) -> Sequence:
        """A sequence of at most ``capacity`` tokens with the first ``slots`` (all by default) of
        its slots; ``run_prompt`` is next.

        ``shares``: it may begin with what another left in the cache, and leave its own. Raises
        ``EngineError`` as ``start`` does.
        """
        longest = self.decoder.max_sequence_length
        capacity = longest if capacity is None else capacity
        self._check(ids, capacity, sampling)
        self.measure()
        self._prepare(len(self.placement.sequences) + 1, len(ids))
        sequence = Sequence(
            tokens=list(ids),
            prompt_length=len(ids),
            first_slot=0,
            capacity=0,
            max_new_tokens=max_new_tokens,
            stop=stop,
            sampling=sampling,
            generator=None if sampling.greedy else sampling.generator(),
            draft=self.draft.fresh() if self.draft is not None else None,
            schedule=self.schedule.fresh() if self.schedule is not None else None,
            features=self.placement.features,
            # states of recurrent layers are one text's
            shares=shares and not self.decoder.kv.states,
        )
        slots = capacity if slots is None else slots
        if not self.placement.place(sequence, slots):
            raise no_slots(slots)
        return sequence

    def run_prompt(
        self, sequence: Sequence, most: int | None = None, on_layer: OnLayer | None = None
    ) -> bool:
        """Run up to ``most`` further tokens of a prompt, as many as there is code for by default,
        or of a text that was suspended; whether that was all.

        After the last token of a prompt its first new token is generated.
        """
        recorder = self.recorder
        if on_layer is None and recorder is not None and not sequence.generated:

            def on_layer(layer: int, hidden: Tensor) -> None:
                recorder.add(sequence, layer, hidden[0])

        if not sequence.num_prefilled:
            self.placement.share(sequence)
        most = most or self.decoder.buckets[-1]
        logits = run_chunk(sequence, self.decoder, most, on_layer)
        if sequence.in_prompt:
            return False
        if logits is not None:
            token = self.verifier.next_token(logits, sequence, sequence.tokens)
            sequence.append([token], self.decoder.num_layers)
            sequence.num_confirmed = len(sequence.tokens)
        self.sequences.append(sequence)
        return True

    def suspend(self, sequence: Sequence) -> None:
        """Take the slots of ``sequence`` for others; ``resume`` goes on with it."""
        self.catch_up([sequence])
        if sequence in self.sequences:
            self.sequences.remove(sequence)
        elif sequence.draft is not None and not sequence.generated:
            # its prompt begins anew
            sequence.draft, sequence.num_followed = sequence.draft.fresh(), 0
        self.placement.leave(sequence)

    def resume(self, sequence: Sequence, slots: int) -> bool:
        """Give a suspended sequence ``slots`` slots again, for ``run_prompt`` to run its text anew;
        False if there are too few."""
        return self.placement.place(sequence, slots)

    def prefill(self, ids: SequenceOf[int], on_layer: OnLayer) -> None:
        """Run ``ids`` through all layers, for their hidden states alone.

        ``on_layer`` is called as in ``Decoder.forward``, for one chunk of ``ids`` after another.
        """
        self.end(self.start(ids, on_layer=on_layer))

    def end(self, sequence: Sequence) -> None:
        """Remove a sequence and free its slots; one that was suspended has none."""
        if sequence.capacity:
            self.placement.leave(sequence)
        if sequence in self.sequences:
            self.sequences.remove(sequence)
            if self._ended is not None:
                self._ended(self.planner, sequence.tokens[: sequence.num_confirmed])

    def reset(self) -> None:
        """End all sequences."""
        for sequence in list(self.sequences):
            self.end(sequence)

    def step(self, sequences: SequenceOf[Sequence] | None = None) -> None:
        """One pass over ``sequences`` (all by default); each grows by one token or more."""
        chosen = list(self.sequences if sequences is None else sequences)
        for begin in range(0, len(chosen), self.step_rows):
            self._step(chosen[begin : begin + self.step_rows])

    def catch_up(self, sequences: SequenceOf[Sequence] | None = None) -> None:
        """Run pending tokens through the layers they skipped; in exact mode that confirms them."""
        waiting = [s for s in (self.sequences if sequences is None else sequences) if s.pending]
        while waiting:
            began = perf_counter()
            batch, rows = [], 0
            # a pass has no more rows than a step: for these there is code
            while waiting and (rows := rows + waiting[0].num_pending) <= self.step_rows:
                batch.append(ScheduledSequence(waiting.pop(0)))
            self._run_pass(batch)
            self.statistics.seconds += perf_counter() - began

    def generate(
        self,
        ids: SequenceOf[int],
        max_new_tokens: int,
        stop: frozenset[int] = frozenset(),
        sampling: Sampling = GREEDY,
    ) -> Iterator[DecodedToken]:
        """Tokens after ``ids`` as they are confirmed, up to and including a stop token.

        When the iterator ends or is closed, no token is pending any more.
        """
        sequence = self.start(ids, max_new_tokens, stop, sampling)
        try:
            yield from sequence.take_confirmed()
            while not sequence.finished:
                self.advance(sequence)
                yield from sequence.take_confirmed()
        finally:
            self.catch_up([sequence])
            self.end(sequence)

    def advance(self, sequence: Sequence) -> None:
        """One pass of a ``sequence`` that is not finished; ``EngineError`` if the cache is full."""
        if sequence.at_its_end:
            # all that is missing is the last layer's verification
            self.catch_up([sequence])
        elif sequence.position >= sequence.capacity:
            raise EngineError(
                f"the cache is full at {sequence.position} tokens: {self.decoder.length_hint}"
            )
        else:
            self.step([sequence])

    def follow(self, ids: SequenceOf[int], answer: SequenceOf[int]) -> list[DecodedToken]:
        """Teacher forcing: the next token after each token of ``answer`` but the last.

        For guarantee ``approximate`` and one token a pass.
        """
        sequence = self.start(ids)
        try:
            found = [self.step_after(sequence, token) for token in answer[:-1]]
            self.catch_up([sequence])
        finally:
            self.end(sequence)
        return found

    def step_after(self, sequence: Sequence, token: int) -> DecodedToken:
        """What follows ``token``, which takes the place of the last token of ``sequence``."""
        sequence.replace_last(token)
        self.step([sequence])
        return DecodedToken(sequence.tokens[-1], sequence.exit_layers[-1])

    def _prepare(self, sequences: int, prompt: int) -> None:
        """Compile whatever passes over so many sequences can need: none waits in mid-answer."""
        if self.context_drafts is not None and self.context_drafts.selection.is_long(prompt):
            self.context_drafts.prepare(self.decoder, self.step_rows)
        if sequences <= self._prepared:
            return
        self._prepared = sequences
        each = 1
        if self.exits is not None and {"exits", "both"} & set(self.options.modes):
            each += self.pending_limit
            self.exits.prepare(self.step_rows if "both" in self.options.modes else sequences)
        if self.draft is not None and {"speculation", "both"} & set(self.options.modes):
            each = max(each, *self.planner.costs)
        attends = self.selection is not None and self.context_drafts is None
        slots = self.selection.slots if attends and self.selection else None
        self.decoder.prepare_passes(min(sequences * each, self.step_rows), slots)
        if self.options.kv_policy == "propagate":
            self.decoder.prepare_fills()

    def _check(self, ids: SequenceOf[int], capacity: int, sampling: Sampling) -> None:
        longest, hint = self.decoder.max_sequence_length, self.decoder.length_hint
        if not ids:
            raise EngineError("the prompt is empty: give at least one token")
        if len(ids) > capacity:
            raise EngineError(
                f"the prompt has {len(ids)} tokens, and the cache has room for {capacity}: {hint}"
            )
        if capacity > longest:
            raise EngineError(
                f"{capacity} tokens of prompt and answer are asked for, and a sequence may have "
                f"at most {longest}: {hint}"
            )
        if not self.verifier.exact and self.exits is not None and sampling.repetition_penalty != 1:
            raise EngineError(
                "repetition_penalty: an exit knows too few logits for it; ask for guarantee='exact'"
            )

    def _step(self, chosen: list[Sequence]) -> None:
        # rows each sequence may have, so that one pass holds all of them
        rows = self.step_rows // len(chosen)
        self.catch_up([sequence for sequence in chosen if sequence.num_pending >= rows])
        began, drafting = perf_counter(), self.statistics.draft_seconds
        planner, slots = self.planner, None
        context = self.context_drafts if len(chosen) == 1 else None
        if context is not None and (slots := context.slots_for(chosen[0], planner)) is not None:
            planner, rows = context.planner, MOST_ROWS
        mode = planner.mode(len(chosen))
        before = sum(len(sequence.tokens) for sequence in chosen)
        waiting = 0 if slots is not None else sum(sequence.num_drafted for sequence in chosen)
        batch = self.scheduler.schedule(chosen, mode, rows, planner, self.statistics, slots)
        drafting = self.statistics.draft_seconds - drafting
        new_rows = sum(len(one.tree or ()) for one in batch)
        self._run_pass(batch)
        seconds = perf_counter() - began
        if self._observes and all(one.is_dense for one in batch):
            planner.observe(waiting + new_rows, seconds - drafting)
        appended = sum(len(one.new_tokens) for one in batch)
        grown = sum(len(sequence.tokens) for sequence in chosen) - before
        planner.record(mode, waiting + new_rows, seconds, appended, grown, len(chosen))
        if context is not None:
            like = planner.cost(waiting + new_rows)
            context.learn(batch[0], like + min(drafting, like))
        self.statistics.seconds += seconds

    def _run_pass(self, batch: list[ScheduledSequence]) -> None:
        context = self.context_drafts
        attention = RowContext(self.selection, attends=True)
        if context is not None:
            attention = context.attention(batch, self.planner)
        forward_pass = ForwardPass(
            self.decoder, self.exits, self.statistics, self.placement.features,
            self.options.kv_policy, self.recorder, attention,
        )  # fmt: skip
        drafts = self.scheduler.predictor_drafts(batch, self.statistics)
        forward_pass.run(batch, drafts)
        if context is not None:
            context.remember(attention)
        self.verifier.verify(forward_pass, batch, self.statistics)
        commit(
            batch, self.decoder, self.verifier.exact, self.planner, self.statistics,
            self.placement.features,
        )  # fmt: skip


def no_slots(count: int) -> EngineError:
    return EngineError(
        f"no {count} free slots in the cache: wait for a sequence to end, or give each less "
        "capacity"
    )
