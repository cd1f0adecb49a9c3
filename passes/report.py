"""What passes did: how much they rewrote, what they left alone and why."""

from dataclasses import dataclass, field

from torch.fx import Node


@dataclass(slots=True)
class PassReport:
    rewritten: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def skip(self, where: Node | str, reason: str) -> None:
        self.skipped.append((where.name if isinstance(where, Node) else where, reason))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def add(self, other: "PassReport") -> None:
        self.rewritten += other.rewritten
        self.skipped += other.skipped
        self.notes += other.notes
