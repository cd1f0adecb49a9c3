"""Run passes one after another, check what they leave and, on request, write it down.

A pass is a function ``(graph, report) -> graph``; its options are bound beforehand. It may change
the graph it is given or return another. Where it does not apply it says so in the report; where it
must apply and cannot it raises ``PassError``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from eepass.passes.report import PassReport
from eepass.segments import Segment

# called with the graph and, by name, its report
Pass = Callable[..., Any]
# raises PassError where a result is not what it should be
Check = Callable[[Any], None]


@dataclass(slots=True)
class PassRunner:
    """``report`` collects what all passes did; ``dump``: a folder for the code after each pass, in
    files whose names begin with ``label``."""

    report: PassReport
    dump: Path | None = None
    label: str = ""
    names: list[str] = field(default_factory=list)

    def run(self, graph: Any, passes: Iterable[Pass], check: Check | None = None) -> Any:
        """``graph`` after all ``passes``, the last result checked.

        An error of a pass, of the graph it leaves or of the check notes the passes that ran.
        """
        if not self.names:
            self._write("captured", graph, PassReport())
        try:
            for rewrite in passes:
                self.names.append(getattr(rewrite, "func", rewrite).__name__)
                compiled = {id(module) for module in _modules(graph)}
                report = PassReport()
                graph = rewrite(graph, report=report)
                for module in _modules(graph):
                    module.graph.lint()
                    if id(module) in compiled:
                        module.recompile()
                self.report.add(report)
                self._write(self.names[-1], graph, report)
            if check is not None:
                with torch.no_grad():
                    check(graph)
        except Exception as error:
            error.add_note(f"passes that ran, the last first: {', '.join(self.names[::-1])}")
            raise
        return graph

    def _write(self, name: str, graph: Any, report: PassReport) -> None:
        """Write down what a pass did, and roles and code of each distinct segment it leaves."""
        if self.dump is None:
            return
        lines = [f"rewritten: {report.rewritten}", *report.notes]
        lines += [f"left alone: {where}: {reason}" for where, reason in report.skipped]
        found: dict[str | None, str] = {None: "\n".join(f"# {line}" for line in lines)}
        for place, segment in segments_in(graph):
            roles = "".join(f"#   {role.kind} {role.name}\n" for role in segment.inputs)
            code = f"# {place}\n{roles}{segment.graph.code.strip()}\n"
            found.setdefault(segment.structure or place, code)
        self.dump.mkdir(parents=True, exist_ok=True)
        file = self.dump / f"{self.label}.{len(self.names) + 1}-{name}.py"
        file.write_text("\n".join([*found.values(), ""]), encoding="utf-8")


def segments_in(value: Any, name: str = "") -> Iterator[tuple[str, Segment]]:
    """The segments that a result of a pass is made of, each with where it stands in it."""
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Segment):
        yield name, value
    elif is_dataclass(value):
        parts = ((f.name, getattr(value, f.name)) for f in fields(value))
    elif isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, tuple):
        parts = enumerate(value)
    for key, part in parts:
        yield from segments_in(part, f"{name}.{key}" if name else str(key))


def _modules(graph: Any) -> Iterable[GraphModule]:
    """The graphs of all segments, each once."""
    return {id(segment.graph): segment.graph for _, segment in segments_in(graph)}.values()
