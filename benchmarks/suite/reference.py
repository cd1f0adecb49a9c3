"""The eager Hugging Face model, the reference for all tokens.

An answer is judged under teacher forcing: at each position the eager model gives its logits, with
all tokens of the answer before it. So one token that differs does not make all after it differ, and
near ties, where the order of sums decides, are told from errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.suite.parts import Wrong

# rows run one by one to learn how far row counts alone move logits
NOISE_ROWS = 4
# two sums in other orders than the eager one's part by up to this times what two eager ones do
NOISE_FACTOR = 3.0
# of an answer's tokens; more are no accident
MOST_TIES = 0.2


@torch.no_grad()
def greedy(model: Any, ids: Sequence[int], count: int) -> list[int]:
    """``count`` tokens after ``ids`` by the model's own cache."""
    device = next(model.parameters()).device
    given, cache, tokens = torch.tensor([list(ids)], device=device), None, []
    for _ in range(count):
        output = model(input_ids=given, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        given = output.logits[:, -1:].argmax(-1)
        tokens.append(given)
    return torch.cat(tokens, 1)[0].tolist()


@torch.no_grad()
def follow(model: Any, ids: Sequence[int], answer: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Hidden states after 0 to L layers [n, H], before the final norm, and logits float32 [n, V],
    at the positions whose next tokens are ``answer`` [n]."""
    device = next(model.parameters()).device
    text = torch.tensor([[*ids, *answer[:-1]]], device=device)
    first = len(ids) - 1
    with _hidden_states(model) as seen:
        logits = model(input_ids=text, use_cache=False).logits[0, first:].float()
    return [hidden[first:] for hidden in seen], logits


@torch.no_grad()
def limits(model: Any, ids: Sequence[int]) -> list[float]:
    """By layer, how far the LM head's logits of the hidden state after it may be off:
    ``NOISE_FACTOR`` times what they differ when the last tokens of ``ids`` run one by one."""
    device = next(model.parameters()).device
    text = torch.tensor([list(ids)], device=device)
    with _hidden_states(model) as together:
        model(input_ids=text, use_cache=False)
    output = model(input_ids=text[:, :-NOISE_ROWS], use_cache=True)
    with _hidden_states(model) as apart:
        for row in text[0, -NOISE_ROWS:]:
            cache = output.past_key_values
            output = model(input_ids=row[None, None], past_key_values=cache, use_cache=True)
    head, norm = model.get_output_embeddings(), model.base_model.norm
    count = len(together)
    found = []
    for layer, hidden in enumerate(together):
        single = torch.cat(apart[layer::count])
        off = head(norm(hidden[-NOISE_ROWS:])).float() - head(norm(single)).float()
        found.append(NOISE_FACTOR * float(off.abs().max()))
    # hidden state 0 is an embedding, equal for all row counts
    return [max(own, found[-1]) for own in found]


@contextmanager
def _hidden_states(model: Any) -> Iterator[list[Tensor]]:
    """Hidden states [n, H] before each layer and the final norm, of each forward call within."""
    seen: list[Tensor] = []

    def keep(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append((given[0] if given else named["hidden_states"])[0])

    watched = [*model.base_model.layers, model.base_model.norm]
    hooks = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in watched]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(slots=True)
class Verdict:
    """Answers judged: tokens that are the eager argmax, and near ties, within the noise of it."""

    tokens: int = 0
    equal: int = 0
    near_ties: int = 0
    worst_margin: float = 0.0

    def judge(self, logits: Tensor, answer: Sequence[int], limit: float, what: str) -> None:
        """Compare tokens [n] with logits [n, V]; raises ``Wrong`` for the first that is neither."""
        tokens = torch.tensor(list(answer), device=logits.device)
        margins = logits.max(-1).values - logits.gather(1, tokens[:, None])[:, 0]
        for index, margin in enumerate(margins.tolist()):
            self.tokens += 1
            self.worst_margin = max(self.worst_margin, margin)
            if margin > limit:
                raise Wrong(
                    f"{what}: token {index} of {len(tokens)} is {margin:.3g} below the eager "
                    f"argmax, the noise is {limit:.3g}"
                )
            self.equal += margin == 0
            self.near_ties += margin > 0

    def found(self) -> dict[str, Any]:
        if self.near_ties > MOST_TIES * self.tokens:
            raise Wrong(f"{self.near_ties} of {self.tokens} tokens differ from eager, if by little")
        return {"tokens": self.tokens, "equal": self.equal, "near_ties": self.near_ties,
                "worst_margin": self.worst_margin}  # fmt: skip
