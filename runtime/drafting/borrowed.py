"""Draft tokens from what a checkpoint brings for them: MTP layers and DFlash models of
transformers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from eepass import private_names
from eepass.errors import InputError
from eepass.runtime.decoder.costs import seconds_of
from eepass.runtime.drafting.budget import Budget
from eepass.runtime.drafting.draft import MODEL
from eepass.runtime.drafting.features import Features, Norm, ReadFeatures
from eepass.runtime.drafting.tree import Tree

# rows of a call over a prompt
CHUNK = 256
# of the draft tokens of an MTP layer, how many may be expected to be right
USUAL_HITS = 0.7


class BorrowedDraft:
    """A model that reads hidden states of the tokens before the last one, one row each, and keeps
    keys and values of these rows in a cache of its own; its greedy continuation is drafted.

    ``behind``: rows of so many of the last tokens may change with what follows, and are run anew
    for each draft.
    """

    feature_layers: tuple[int, ...] | None = ()
    expected: float
    calls: float
    behind: int

    def __init__(self, model: Any, norm: Norm, cache: Any) -> None:
        """``norm``: the last one of the model that is drafted for."""
        self.model, self.norm, self.cache = model, norm, _of_whole_texts(cache, model)
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.hidden_size: int = model.config.hidden_size
        self._tokens: list[int] = []
        # rows that the cache holds
        self._length = 0

    def follow(self, tokens: Sequence[int]) -> None:
        self._tokens += tokens

    def propose(self, root: int, budget: Budget, read: ReadFeatures) -> Tree:
        tree = Tree([root])
        self.add_to(tree, budget, read)
        return tree

    def add_to(self, tree: Tree, budget: Budget, read: ReadFeatures) -> None:
        """Add its continuation to ``tree``, which may hold draft tokens of other sources."""
        began = budget.planner.clock()
        if self._catch_up(read):
            budget.behind += budget.planner.clock() - began
        node, joint = 0, 1.0
        for depth, (token, likely) in enumerate(islice(self._drafted(read), budget.most)):
            bin = (MODEL, min(depth, 4), budget.bin(likely))
            chance = budget.chance(bin, prior=likely)
            joint *= chance
            node = tree.add(token, node, chance, bin)
            if not self._goes_on(depth, joint, tree, budget):
                break
        self._cut(self._settled)

    def truncate(self, length: int) -> None:
        del self._tokens[length:]
        self._cut(min(self._length, self._settled))

    def call_seconds(self) -> float:
        draft = self.fresh()
        draft.follow([0] * (self.behind + 1))
        width = (1 + len(self.feature_layers or ())) * self.hidden_size
        rows = torch.zeros(self.behind + 1, width, dtype=self.dtype, device=self.device)

        def read(position: int, count: int) -> Features:
            return Features(rows[:count], [True] * count)

        def call() -> None:
            deque(draft._drafted(read), maxlen=0)
            draft._cut(0)

        return seconds_of(call) / self.calls

    def fresh(self) -> BorrowedDraft:
        raise NotImplementedError

    def _drafted(self, read: ReadFeatures) -> Iterator[tuple[int, float]]:
        """Draft tokens with their chances, each as soon as it is known; none after a first token,
        which no hidden state comes before."""
        raise NotImplementedError

    def _catch_up(self, read: ReadFeatures) -> bool:
        """Run what tokens before have left, if it takes calls of its own; whether it did."""
        return False

    def _goes_on(self, depth: int, joint: float, tree: Tree, budget: Budget) -> bool:
        raise NotImplementedError

    @property
    def _settled(self) -> int:
        """How many rows stay as they are, whatever follows."""
        return max(len(self._tokens) - self.behind, 0)

    def _cut(self, length: int) -> None:
        """Keep the first ``length`` rows; draft tokens and rolled back ones leave nothing."""
        for layer in self.cache.layers:
            if (excess := layer.get_seq_length() - length) > 0:
                layer.crop(-excess)
        self._length = length

    def _positions(self, begin: int, end: int) -> Tensor:
        return torch.arange(begin, end, device=self.device)[None]

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([list(tokens)], device=self.device)


class MtpDraft(BorrowedDraft):
    """``model``: an ``MtpModel``, which shares embedding and LM head with the model it is of.

    Layer d of it, from 0 on, drafts the token d + 2 places after the one whose hidden state its row
    begins with: it takes the state of the layer before, at first the normed last one, and the
    embedding of the token d + 1 places after. So the last d of its rows hold draft tokens.
    """

    def __init__(self, model: Any, norm: Norm) -> None:
        if not hasattr(model, "forward_layer"):
            version = _transformers_version()
            raise InputError(
                f"transformers {version}: its MtpModel has no forward_layer, which drafts need; "
                "install a later one (docs/versions.md)"
            )
        super().__init__(model, norm, private_names.MtpCache(config=model.config))
        self.depths: int = model.num_mtp_layers
        self.calls = float(self.depths)
        self.expected = 1 + sum(USUAL_HITS**depth for depth in range(1, self.depths + 1))
        # of the last layer's rows but one a token each; and one row there must be
        self.behind = max(self.depths, 2)

    def fresh(self) -> MtpDraft:
        return MtpDraft(self.model, self.norm)

    def _catch_up(self, read: ReadFeatures) -> bool:
        begin, settled = self._length, self._settled
        for first in range(begin, settled, CHUNK):
            count = min(CHUNK, settled - first)
            follow = self._tokens[first + 1 : first + count + self.depths]
            deque(self._run(first, count, follow, read), maxlen=0)
        self._length = settled
        return begin < settled

    def _drafted(self, read: ReadFeatures) -> Iterator[tuple[int, float]]:
        begin = self._settled
        follow = self._tokens[begin + 1 :]
        if not follow:
            return
        for hidden in self._run(begin, len(follow), follow, read):
            logits = self.model._project_to_logits(hidden[:, -1:])[0, 0].float()
            likely, token = logits.softmax(-1).max(-1)
            follow.append(int(token))
            yield follow[-1], float(likely)

    def _run(
        self, begin: int, count: int, follow: list[int], read: ReadFeatures
    ) -> Iterator[Tensor]:
        """Hidden states [1, n, H] after each layer of the rows of ``count`` tokens from position
        ``begin`` on; ``follow``: the tokens after the first of them, which may grow meanwhile."""
        rows = read(begin, count).value(self.hidden_size, self.norm)
        hidden = rows[None].to(self.device)
        for depth in range(self.depths):
            first = begin + 1 + depth
            hidden = self.model.forward_layer(
                depth, hidden, self._positions(first, first + count), self.cache,
                input_ids=self._ids(follow[depth : depth + count]),
            )  # fmt: skip
            yield hidden

    def _goes_on(self, depth: int, joint: float, tree: Tree, budget: Budget) -> bool:
        return depth + 1 < self.depths and budget.worth_a_call(tree.joint()[1:], [joint])


class DFlashDraft(BorrowedDraft):
    """``model``: a DFlash assistant, which drafts a block of tokens in one call. Its rows are made
    of the hidden states after some layers."""

    expected, calls = 3.0, 1.0
    # its rows never change, and one there must be
    behind = 2

    def __init__(
        self,
        model: Any,
        norm: Norm,
        num_layers: int,
        embed: Callable[[Tensor], Tensor],
        head: Callable[[Tensor], Tensor],
    ) -> None:
        """``num_layers``: of the model that is drafted for; ``embed``: its embedding of tokens;
        ``head``: the linear layer that its logits come from."""
        super().__init__(model, norm, private_names.DFlashCache(config=model.config))
        self.num_layers, self.embed, self.head = num_layers, embed, head
        # transformers counts layers from 0 on, and norms what comes after the last
        after = [layer + 1 for layer in model.config.target_layer_ids]
        self.feature_layers = tuple(sorted({layer for layer in after if layer < num_layers}))
        self._places = [
            0 if layer == num_layers else 1 + self.feature_layers.index(layer) for layer in after
        ]

    def fresh(self) -> DFlashDraft:
        return DFlashDraft(self.model, self.norm, self.num_layers, self.embed, self.head)

    def _drafted(self, read: ReadFeatures) -> Iterator[tuple[int, float]]:
        begin, end = self._length, len(self._tokens) - 1
        if end <= begin:
            return
        config = self.model.config
        block = [self._tokens[-1], *[config.mask_token_id] * (config.block_size - 1)]
        self.cache.set_previous_accepted_tokens(end - begin)
        found = self.model(
            noise_embeds=self.embed(self._ids(block)),
            context_hidden_states=self._context(begin, end - begin, read),
            position_ids=self._positions(begin, end + len(block)),
            past_key_values=self.cache,
        )
        logits = self.head(found.last_hidden_state[:, 1:])[0].float()
        likely, tokens = logits.softmax(-1).max(-1)
        yield from zip(tokens.tolist(), likely.tolist(), strict=True)

    def _context(self, begin: int, count: int, read: ReadFeatures) -> Tensor:
        features = read(begin, count)
        rows = features.rows
        if 0 in self._places:
            rows = features.value(self.hidden_size, self.norm)
        states = rows.unflatten(1, (-1, self.hidden_size))[:, self._places]
        return states.flatten(1)[None].to(self.device)

    def _goes_on(self, depth: int, joint: float, tree: Tree, budget: Budget) -> bool:
        # what follows is drafted already
        return budget.worth_a_row(joint)


def _of_whole_texts(cache: Any, model: Any) -> Any:
    """``cache`` with every layer keeping the whole text, so that it can be cut anywhere: windows
    lie in the masks. ``InputError`` for states that cannot be cut at all."""
    recurrent = private_names.LinearAttentionCacheLayerMixin
    if any(isinstance(layer, recurrent) for layer in cache.layers):
        raise InputError(
            f"{type(model).__name__}: it has recurrent layers, whose states cannot be rolled back"
        )
    cache.layers = [
        private_names.DynamicLayer() if layer.is_sliding else layer for layer in cache.layers
    ]
    return cache


def _transformers_version() -> str:
    import transformers

    return str(transformers.__version__)
