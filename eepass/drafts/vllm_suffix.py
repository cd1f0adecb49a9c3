"""Text drafts in vLLM, whose process imports these classes by name:

    speculative_config={"method": "custom_class", "num_speculative_tokens": 8,
                        "model": "eepass.drafts.vllm_suffix.SuffixDrafts"}

vLLM hands over the tokens of all sequences of a batch after each pass, and not which sequence
stands in which row: a sequence is known again by its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eepass.errors import InputError
from eepass.runtime.drafting.suffix import EarlierTexts, SuffixDraft

# so many tokens that match say enough for as many that follow; fewer than these say too little
LEAST_MATCHED = 2
Ids = NDArray[np.integer[Any]]


class SuffixDrafts:
    """Drafts for each sequence what followed its last tokens before, in its own text alone."""

    earlier: EarlierTexts | None = None

    def __init__(self, vllm_config: Any) -> None:
        """``vllm_config``: vLLM's ``VllmConfig``. Raises ``InputError`` where it does not say how
        many tokens a draft may have, or how long a text."""
        try:
            self.most = int(vllm_config.speculative_config.num_speculative_tokens)
            self.longest = int(vllm_config.model_config.max_model_len)
        except (AttributeError, TypeError) as error:
            raise InputError(
                f"this vLLM's configuration is another than expected ({error}): "
                "docs/servers.md names the version that was tested"
            ) from error
        self._known: list[_Text] = []

    def load_model(self, target_model: object) -> None:
        """vLLM calls it once its own model is there; nothing is read here."""

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: Ids,
        token_ids_cpu: Ids,
        slot_mappings: object = None,
    ) -> list[list[int]]:
        """A chain of draft tokens, which may be empty, for each of N sequences.

        ``sampled_token_ids``: what the pass gave each of them, nothing where its prompt is not
        done; ``token_ids_cpu`` [rows, longest]: their texts, of which the first
        ``num_tokens_no_spec`` [rows] tokens count; rows beyond N are not read.
        """
        before, self._known = self._known, []
        drafts = []
        for row, new in enumerate(sampled_token_ids):
            ids = token_ids_cpu[row, : num_tokens_no_spec[row]]
            if not len(new) or len(ids) >= self.longest:
                drafts.append(list[int]())
                continue
            text = max(
                (one for one in before if one.begins(ids)), key=lambda one: len(one.ids),
                default=None,
            )  # fmt: skip
            if text is None:
                text = _Text(self.earlier)
            else:
                before.remove(text)
            text.follow(ids)
            self._known.append(text)
            drafts.append(text.draft(min(self.most, self.longest - len(ids))))
        if self.earlier is not None:
            for ended in before:
                self.earlier.add(ended.ids.tolist())
        return drafts


class SharedSuffixDrafts(SuffixDrafts):
    """As ``SuffixDrafts``, and what followed in texts of earlier requests, whoever sent them."""

    def __init__(self, vllm_config: Any) -> None:
        super().__init__(vllm_config)
        self.earlier = EarlierTexts()


class _Text:
    """A sequence: its tokens, and the draft that follows them."""

    def __init__(self, earlier: EarlierTexts | None) -> None:
        self.ids: Ids = np.empty(0, dtype=np.int64)
        self._draft = SuffixDraft(earlier)

    def begins(self, ids: Ids) -> bool:
        """Whether ``ids`` are more of this text."""
        return len(self.ids) < len(ids) and bool((ids[: len(self.ids)] == self.ids).all())

    def follow(self, ids: Ids) -> None:
        self._draft.follow(ids[len(self.ids) :].tolist())
        # the caller writes on in its own array
        self.ids = ids.copy()

    def draft(self, most: int) -> list[int]:
        tokens, matched = self._draft.continuation((), most)
        return tokens[:matched] if matched >= LEAST_MATCHED else []
