"""The decode loop: drafts, one pass over them, what holds is kept, what does not is taken back.

A token that leaves early is *pending*: the deeper layers have not seen it. Its boundary state
waits, and the next pass that goes deeper takes it along as an extra row, so every layer sees every
token in order and no weight is read twice. With guarantee ``exact`` such a token is a guess until
the last layer has said what follows the one before it; a wrong guess is taken back with everything
after it, and a stream only ever sees what is confirmed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor

from eepass.errors import EngineError
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.decoder.side_inputs import Row
from eepass.runtime.drafting.drafts import Draft, EagleTree
from eepass.runtime.drafting.planner import Budget, Mode, Planner
from eepass.runtime.drafting.tree import Tree
from eepass.runtime.engine.forward_pass import ForwardPass, Part, norm_paths
from eepass.runtime.engine.sequence import DecodedToken, Sequence
from eepass.runtime.engine.verifier import Verifier
from eepass.runtime.exits.exits import Exits
from eepass.runtime.exits.scheduler import PredictorSchedule
from eepass.runtime.sampling import Sampling
from eepass.runtime.statistics import Statistics

OnLayer = Callable[[int, Tensor], None]
GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Options:
    """How an engine decodes. ``pending_limit`` bounds the tokens waiting for the deeper layers;
    ``modes`` are the ways of decoding the planner may choose from, the plainest first."""

    guarantee: Literal["exact", "approximate"] = "approximate"
    kv_policy: Literal["defer", "propagate", "drop"] = "defer"
    pending_limit: int = 7
    modes: tuple[Mode, ...] = ("dense",)


class Engine:
    """Decodes sequences over a ``Decoder``; without ``exits`` and ``draft`` it is dense."""

    def __init__(
        self,
        decoder: Decoder,
        exits: Exits | None = None,
        schedule: PredictorSchedule | None = None,
        draft: Draft | None = None,
        options: Options | None = None,
        planner: Callable[[], Planner] | None = None,
        noise: Callable[[], float] | None = None,
    ) -> None:
        """``planner`` and ``noise`` measure, in an empty cache, before the first sequence."""
        self.decoder, self.exits = decoder, exits
        self.schedule, self.draft = schedule, draft
        if options is None:
            options = Options(modes=("exits",) if exits is not None else ("dense",))
        self.options = options
        self.step_rows = max(size for size in decoder.buckets if size <= 32)
        self.pending_limit = min(options.pending_limit, self.step_rows - 1)
        sizes = [size for size in decoder.buckets if size <= self.step_rows]
        self.planner = Planner(dict.fromkeys(sizes, 1.0), modes=options.modes)
        self._to_measure = (planner, noise)
        self.statistics = Statistics(decoder.num_layers)
        self.verifier = Verifier(decoder, options.guarantee == "exact")
        self.sequences: list[Sequence] = []

    def measure(self) -> None:
        """Measure what has not been measured yet, if no sequence is in the cache."""
        if not self.decoder.kv.unused:
            return
        planner, noise = self._to_measure
        if planner is not None:
            self.planner = planner()
            self.planner.modes = self.options.modes
            several = "both" in self.options.modes
            if self.exits is not None and (several or "exits" in self.options.modes):
                self.exits.prepare(max(self.planner.costs) if several else 1)
        if noise is not None and self.verifier.exact:
            self.verifier.noise = noise()
        self._to_measure = (None, None)

    def start(
        self,
        ids: SequenceOf[int],
        max_new_tokens: int = 1 << 30,
        stop: frozenset[int] = frozenset(),
        sampling: Sampling = GREEDY,
        room: int | None = None,
        on_layer: OnLayer | None = None,
    ) -> Sequence:
        """Take a sequence in: run its prompt and find its first token.

        ``room``: slots to reserve, as many as a sequence may have by default. Raises
        ``EngineError`` for an empty prompt, one that does not fit, or when no room is left.
        """
        kv, longest = self.decoder.kv, self.decoder.longest
        wanted = longest if room is None else room
        if not ids:
            raise EngineError("the prompt is empty: give at least one token")
        if len(ids) > wanted:
            raise EngineError(
                f"the prompt has {len(ids)} tokens, the cache room for {wanted}: "
                f"{self.decoder.remedy}"
            )
        if wanted > longest:
            raise EngineError(
                f"room for {wanted} tokens is wanted, and a sequence may have {longest}: "
                f"{self.decoder.remedy}"
            )
        if not self.verifier.exact and self.exits is not None and sampling.repetition_penalty != 1:
            raise EngineError(
                "repetition_penalty: an exit knows too few logits for it; ask for guarantee='exact'"
            )
        self.measure()
        first = kv.allocate(wanted)
        if first is None:
            raise EngineError(
                f"no {wanted} free slots in the cache: wait for a sequence to end, or give each "
                "less room"
            )
        sequence = Sequence(
            tokens=list(ids),
            prompt_length=len(ids),
            first=first,
            room=wanted,
            limit=max_new_tokens,
            stop=stop,
            sampling=sampling,
            generator=None if sampling.greedy else sampling.generator(),
            draft=self.draft.fresh() if self.draft is not None else None,
            schedule=self.schedule.fresh() if self.schedule is not None else None,
        )
        try:
            hidden = self._prefill(sequence, list(ids), on_layer)
            token = self.verifier.first_token(hidden, sequence)
        except BaseException:
            # whatever ended the prompt, Ctrl-C included: nobody else would give its slots back
            kv.release(first)
            raise
        self._grow(sequence, [token], self.decoder.num_layers, sequence.states.get(len(ids) - 1))
        sequence.confirmed = len(sequence.tokens)
        self.sequences.append(sequence)
        return sequence

    def reset(self) -> None:
        """Let all sequences go."""
        for sequence in list(self.sequences):
            self.end(sequence)

    def prefill(self, ids: SequenceOf[int], on_layer: OnLayer) -> None:
        """Run ``ids`` through all layers from the cache's first slot on, for their states alone.

        ``on_layer(layer, hidden)`` sees each boundary [1, rows, H] of each chunk; with a sequence
        in the cache this raises ``EngineError``.
        """
        self.end(self.start(ids, on_layer=on_layer))

    def end(self, sequence: Sequence) -> None:
        """Let a sequence go, and its slots."""
        if sequence in self.sequences:
            self.sequences.remove(sequence)
            self.decoder.kv.release(sequence.first)

    def step(self, sequences: SequenceOf[Sequence] | None = None) -> None:
        """One pass for ``sequences`` (all by default); each grows by a guess or a token or more."""
        chosen = list(self.sequences if sequences is None else sequences)
        for begin in range(0, len(chosen), self.step_rows):
            self._step(chosen[begin : begin + self.step_rows])

    def _step(self, chosen: list[Sequence]) -> None:
        # each may bring as many rows as fit one pass of all
        share = self.step_rows // len(chosen)
        self.catch_up([sequence for sequence in chosen if sequence.pending >= share])
        began = perf_counter()
        mode = self.planner.mode(len(chosen))
        before = [sequence.confirmed for sequence in chosen]
        parts = [self._part(sequence, mode, share, len(chosen) - 1) for sequence in chosen]
        rows = sum(len(part.tree or ()) for part in parts)
        self._pass(parts)
        tokens = sum(s.confirmed for s in chosen) - sum(before)
        seconds = perf_counter() - began
        self.planner.record(mode, rows, seconds, tokens, len(chosen))
        self.statistics.seconds += seconds

    def catch_up(self, sequences: SequenceOf[Sequence] | None = None) -> None:
        """Run what is pending through the layers it has not seen; exact mode confirms it so."""
        chosen = [s for s in (self.sequences if sequences is None else sequences) if s.waiting]
        most = self.decoder.buckets[-1] // (self.pending_limit + 1)
        for begin in range(0, len(chosen), most):
            began = perf_counter()
            self._pass([Part(sequence, None) for sequence in chosen[begin : begin + most]])
            self.statistics.seconds += perf_counter() - began

    def generate(
        self,
        ids: SequenceOf[int],
        max_new_tokens: int,
        stop: frozenset[int] = frozenset(),
        sampling: Sampling = GREEDY,
    ) -> Iterator[DecodedToken]:
        """Tokens after ``ids`` as they are confirmed; a stop token is the last one given.

        When the iterator ends or is closed, no token is pending any more.
        """
        sequence = self.start(ids, max_new_tokens, stop, sampling)
        try:
            yield from sequence.take()
            while not sequence.finished:
                if sequence.at_its_end:
                    # nothing follows but the word of the deeper layers
                    self.catch_up([sequence])
                elif sequence.position >= sequence.room:
                    raise EngineError(
                        f"the cache is full at {sequence.position} tokens: {self.decoder.remedy}"
                    )
                else:
                    self.step([sequence])
                yield from sequence.take()
        finally:
            self.catch_up([sequence])
            self.end(sequence)

    def follow(self, ids: SequenceOf[int], answer: SequenceOf[int]) -> list[DecodedToken]:
        """Teacher forcing: what would follow each token of ``answer`` but the last, given it.

        For engines that commit at once (``approximate``) and make one token a pass.
        """
        sequence = self.start(ids)
        found: list[DecodedToken] = []
        try:
            for token in answer[:-1]:
                sequence.replace_last(token)
                self.step([sequence])
                found.append(DecodedToken(sequence.tokens[-1], sequence.exit_layers[-1]))
            self.catch_up([sequence])
        finally:
            self.end(sequence)
        return found

    def _part(self, sequence: Sequence, mode: Mode, rows: int, beside: int) -> Part:
        tree = Tree([sequence.tokens[-1]])
        pending = sequence.pending
        if mode in ("speculation", "both") and sequence.draft is not None:
            free = min(
                rows - 1 - pending,
                sequence.room - sequence.position - 1,
                sequence.limit - (len(sequence.tokens) - sequence.prompt_length) - 1,
            )
            if free > 0:
                began = perf_counter()
                proposed = sequence.draft.propose(tree.tokens[0], Budget(self.planner, free))
                tree = self.planner.choose(proposed, free, pending, beside)
                self.statistics.draft_seconds += perf_counter() - began
        active: frozenset[int] = frozenset()
        if mode in ("exits", "both") and self.exits is not None:
            active = self._active(sequence, pending + len(tree), rows)
        choose = self.verifier.chooser(sequence)
        return Part(sequence, tree, active, choose)

    def _active(self, sequence: Sequence, held: int, share: int) -> frozenset[int]:
        assert self.exits is not None
        last = self.decoder.num_layers
        if sequence.schedule is not None:
            active = sequence.schedule.active()
        else:
            active = frozenset(self.exits.thresholds)
        if self.options.guarantee == "exact":
            # the last layer's word must be whole
            active -= {last}
        if self.options.kv_policy == "defer" and held > min(self.pending_limit, share - 1):
            active &= {last}
        return active

    def _pass(self, parts: list[Part]) -> None:
        draft = self.draft
        layers = draft.feature_layers if draft is not None and draft.feature_layers else ()
        verification = ForwardPass(
            self.decoder, self.exits, self.statistics, layers, self.options.kv_policy
        )
        verification.run(parts, self._draft_candidates(parts))
        self.verifier.decide(verification, parts, self.statistics)
        self.statistics.passes += 1
        if self.exits is not None and draft is not None and draft.feature_layers is not None:
            norm_paths(parts, self.exits)
        for part in parts:
            self._settle(part)

    def _draft_candidates(self, parts: list[Part]) -> Tensor | None:
        """Draft tokens [R, K] for the predictors, where the plan takes them from no boundary."""
        if self.exits is None or self.exits.plan.draft_layer or not any(p.active for p in parts):
            return None
        k = self.exits.plan.draft_tokens
        rows = []
        for part in parts:
            draft = part.sequence.draft
            assert isinstance(draft, EagleTree) and part.tree is not None
            if len(part.tree) > 1:
                raise EngineError("exits that draft from no boundary go with one row a pass")
            began = perf_counter()
            rows.append(draft.candidates(k))
            self.statistics.draft_seconds += perf_counter() - began
        return torch.stack(rows)

    def _settle(self, part: Part) -> None:
        """Write what a pass found into its sequence."""
        sequence, path = part.sequence, part.path
        confirmed = sequence.confirmed
        states = None
        if sequence.draft is not None and sequence.draft.feature_layers is not None:
            if path:
                states = part.states(sequence.draft.feature_layers)
            elif part.keep is not None:
                states = sequence.states[part.keep - 1]
        if part.keep is not None:
            sequence.roll_back(part.keep)
            self.statistics.rollbacks += 1
        elif path:
            first = sequence.first + sequence.position
            self.decoder.kv.move([first + node for node in path], first, part.layer)
        self._grow(sequence, part.tokens, part.layer, states)
        sequence.cut_waiting()
        left_early = part.layer < self.decoder.num_layers
        if not (self.options.guarantee == "exact" and left_early):
            sequence.confirmed = len(sequence.tokens)
        for step in sequence.steps(confirmed, sequence.confirmed):
            self.statistics.left_at(step.exit_layer)
        if part.tree is not None and part.keep is None:
            self.planner.learn(part.tree, path)

    @staticmethod
    def _grow(
        sequence: Sequence, tokens: list[int], exit_layer: int, states: Tensor | None
    ) -> None:
        """Append ``tokens`` and tell the draft; ``states`` [n, F·H] of the token before each."""
        if not tokens:
            return
        if states is not None:
            states = states.reshape(len(tokens), -1)
            sequence.keep_states(states)
        sequence.extend(tokens, exit_layer)
        if sequence.draft is not None:
            sequence.draft.follow(tokens, states)

    def _prefill(self, sequence: Sequence, ids: list[int], on_layer: OnLayer | None) -> Tensor:
        """Run a prompt through all layers; returns its last token's last boundary [1, 1, H]."""
        decoder, largest = self.decoder, self.decoder.buckets[-1]
        wanted = sequence.draft.feature_layers if sequence.draft is not None else None
        hidden, before = torch.zeros(0), None
        kept: dict[int, Tensor] = {}

        def keep(layer: int, boundary: Tensor) -> None:
            if on_layer is not None:
                on_layer(layer, boundary)
            if wanted is not None and layer in wanted:
                kept[layer] = boundary[0]

        for start in range(0, len(ids), largest):
            chunk = ids[start : start + largest]
            rows = [
                Row(sequence.first, at, sequence.first + at)
                for at in range(start, start + len(chunk))
            ]
            hidden = decoder.forward(chunk, rows, sequence.first + sequence.room, keep)
            told = None
            if wanted is not None:
                assert self.exits is not None
                z = self.exits.final(hidden)[0]
                seen = torch.cat([z, *(kept[n] for n in wanted)], -1)
                # nothing comes before the first token
                before = torch.zeros_like(seen[:1]) if before is None else before
                told, before = torch.cat([before, seen[:-1]]), seen[-1:].clone()
            if sequence.draft is not None:
                # chunk by chunk, so that states of the whole prompt never lie there at once
                sequence.draft.follow(chunk, told)
        if before is not None:
            sequence.states[len(ids) - 1] = before[0]
        return hidden[:, -1:]
