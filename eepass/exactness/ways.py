"""The ways of decoding that have to give the dense answer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from eepass.config import ExitConfig
from eepass.exactness.decoding import Company
from eepass.model import EarlyExitModel

# sequences together, dense and with everything else on
TOGETHER = (2, 5, 16)
ALONE, JOINING = Company(), Company(most=6, waits=0.6, moved=True)


@dataclass(frozen=True, slots=True)
class Way:
    """``config``: None for dense; ``sampled``: by a seed and not greedily; ``threads``: 0 for all
    that there are."""

    name: str
    config: ExitConfig | None
    company: Company = ALONE
    sampled: bool = False
    threads: int = 0


def ways_of(model: EarlyExitModel) -> list[Way]:
    """The ways that ``model`` has, each mechanism by itself and then all of them in company."""
    alone = {"dense, once more": None, **_configs(model)}
    found = [Way(name, config) for name, config in alone.items()]
    most, everything = found[-1].name, found[-1].config
    for together in TOGETHER:
        company = Company(most=together)
        found.append(Way(f"dense, {together} together", None, company))
        found.append(Way(f"{most}, {together} together", everything, company))
    found += [
        Way("dense, joining anywhere", None, JOINING),
        Way(f"{most}, joining anywhere", everything, JOINING),
        Way(f"sampled, {most}", everything, sampled=True),
        Way("sampled, dense, joining anywhere", None, JOINING, sampled=True),
        Way(f"sampled, {most}, joining anywhere", everything, JOINING, sampled=True),
    ]
    if torch.get_num_threads() > 1:
        found += [
            Way("dense, one thread", None, threads=1),
            Way(f"{most}, one thread", everything, threads=1),
        ]
    return found


def _configs(model: EarlyExitModel) -> dict[str, ExitConfig]:
    """Each mechanism in every pass, whether it pays or not; all together come last."""
    drafts = ExitConfig(exits=False, adaptive=False, remember=False)
    found = {"drafts of the text": replace(drafts, speculate="suffix")}
    artifact = model.artifact
    if artifact is None:
        return found
    if any(name.startswith("eagle.") for name in artifact.tensors):
        found["drafts of the head"] = replace(drafts, speculate="eagle")
        found["drafts of both"] = replace(drafts, speculate="cascade")
    if not model.has_exits:
        return found
    found["exits"] = ExitConfig(speculate="off", adaptive=False)
    found["drafts and exits"] = ExitConfig(adaptive=False, remember=False)
    return found
