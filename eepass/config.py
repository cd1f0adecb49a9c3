"""The options of early exit."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

Preset = Literal["default", "paper"]
# tokens that are attended to at the least where not all are: the first and the latest are included
LEAST_CONTEXT = 128


@dataclass(frozen=True, slots=True)
class ExitConfig:
    """Options of early exit; ``ExitConfig.preset("paper")`` is the method as published.

    Raises ``ValueError`` naming the field and its value.
    """

    name: Preset = "default"
    # share of tokens that equal the dense argmax under teacher forcing
    target_agreement: float = 0.98
    # one threshold for every exit instead of the calibrated ones
    threshold: float | None = None
    kv: Literal["defer", "propagate", "drop"] = "defer"
    # where draft tokens come from: a translated early hidden state, or the trained one-layer head
    draft: Literal["lens", "eagle"] = "lens"
    verify: Literal["hot", "full"] = "hot"
    translators: bool = True
    schedule: bool = True
    # how many tokens may be pending, that is, have skipped the deeper layers so far
    pending: int = 7
    # exact: the dense answer, wrong exits are rolled back; approximate: as published
    guarantee: Literal["exact", "approximate"] = "exact"
    # whether tokens may exit early at all
    exits: bool = True
    # what drafts several tokens to be verified in one pass; lens: early exits alone
    speculate: Literal["cascade", "eagle", "suffix", "model", "lens", "off"] = "cascade"
    # whether drafts may repeat earlier requests of this process; not where these are other users'
    remember: bool = True
    # use each mechanism only where measured costs and acceptance say that it pays; captured steps
    # measure nothing, so that those with exits and drafts want False
    adaptive: bool = True
    # what generated tokens attend to once a text is longer than context_tokens: all of it; in most
    # layers so many tokens, those that an earlier layer attends to most; or the latest ones alone
    context: Literal["full", "selected", "recent"] = "full"
    context_tokens: int = 1024
    # whether passes that attend to so many tokens may draft, for others to verify, where all is
    # attended to and answers are exact
    context_drafts: bool = True

    def __post_init__(self) -> None:
        if self.speculate == "ngram":
            # what text drafts were called when they looked at a few tokens only
            object.__setattr__(self, "speculate", "suffix")
        hints = get_type_hints(type(self))
        for field in fields(self):
            if get_origin(hints[field.name]) is Literal:
                known = get_args(hints[field.name])
                if getattr(self, field.name) not in known:
                    self._refuse(field.name, f"one of {', '.join(map(str, known))}")
        if not 0 < self.target_agreement < 1:
            self._refuse("target_agreement", "between 0 and 1")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            self._refuse("threshold", "between 0 and 1")
        if not 0 <= self.pending <= 31:
            self._refuse("pending", "between 0 and 31")
        if self.kv != "defer" and (self.guarantee == "exact" or self.speculate != "off"):
            self._refuse("kv", "defer, where answers are exact or several tokens go in one pass")
        if self.context_tokens < LEAST_CONTEXT:
            self._refuse("context_tokens", f"at least {LEAST_CONTEXT}")
        if self.context != "full" and self.guarantee == "exact":
            self._refuse("context", "full, unless guarantee='approximate'")
        if self.draft == "eagle" and self.exits and self.speculate not in ("off", "lens"):
            self._refuse("draft", "lens, where several tokens go in one pass and may exit early")

    def approximate(self, target: float | None = None) -> ExitConfig:
        """Plain early exit: one token a pass, committed at once, in every pass."""
        target = self.target_agreement if target is None else target
        return replace(
            self, guarantee="approximate", exits=True, speculate="off", adaptive=False,
            target_agreement=target,
        )  # fmt: skip

    @property
    def modes(self) -> tuple[str, ...]:
        """The ways of decoding this allows, the plainest first."""
        speculation = self.speculate not in ("off", "lens")
        found = ["dense"]
        found += ["exits"] if self.exits else []
        found += ["speculation"] if speculation else []
        found += ["both"] if speculation and self.exits else []
        return tuple(found) if self.adaptive else tuple(found[-1:])

    def _refuse(self, name: str, wanted: str) -> None:
        raise ValueError(f"{name}={getattr(self, name)!r}: must be {wanted}")

    @classmethod
    def preset(cls, name: str) -> ExitConfig:
        """``default``: lossless, whatever pays. ``paper``: lens, EAGLE draft, whole LM head,
        threshold 0.5, one token a pass, committed at once."""
        if name == "default":
            return cls()
        if name == "paper":
            return cls(
                name="paper", draft="eagle", verify="full", translators=False, threshold=0.5,
                guarantee="approximate", speculate="off", adaptive=False,
            )  # fmt: skip
        raise ValueError(f"preset={name!r}: must be one of default, paper")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ExitConfig:
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown options {', '.join(unknown)}; known: {sorted(known)}")
        return replace(cls(), **values)
