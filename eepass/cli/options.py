"""Options that several commands share, and the ``ExitConfig`` they describe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[
    str,
    typer.Argument(
        help="Hugging Face folder or id, a .gguf file, smollm2, or a folder eepass transform wrote."
    ),
]
Dtype = Annotated[
    str | None, typer.Option(help="bf16 (the default) or fp32; a transformed folder has its own.")
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-native", help="Run the native code of a transformed folder you did not make."
    ),
]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 takes all cores.", min=0)]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")]
ArtifactDir = Annotated[
    Path | None,
    typer.Option(
        "--artifact", help="Folder eepass train wrote, or its id on the hub: org/name[@revision]."
    ),
]
DraftsAlone = Annotated[
    bool,
    typer.Option(
        "--drafts-alone",
        help="Take the artefact's draft head alone: for its model with an adapter, or trained on.",
    ),
]
Prompts = Annotated[Path | None, typer.Option(help='JSONL, {"prompt": "..."} a line.')]
Raw = Annotated[bool, typer.Option("--raw", help="Do not apply the model's chat template.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
MaxLength = Annotated[
    int | None,
    typer.Option(
        help="Prompt and answer together, in tokens; bounded by the positions the model knows.",
        min=64,
    ),
]
Preset = Annotated[str, typer.Option(help="default, or paper: the method as published.")]
Target = Annotated[
    float, typer.Option(help="Agreement with the dense answer to keep where output is approximate.")
]
Guarantee = Annotated[str, typer.Option(help="exact: the dense answer; approximate: as published.")]
Speculate = Annotated[
    str, typer.Option(help="Who drafts tokens ahead: cascade, eagle, suffix, lens or off.")
]
Quantize = Annotated[
    str,
    typer.Option(
        help="keep: the GGUF file's own, where there are kernels for it; none: bf16 or fp32; "
        "int8, int4 or int8-dynamic: with torchao."
    ),
]
Activations = Annotated[
    str,
    typer.Option(
        help="What is multiplied with quantised weights: int8, rounded as llama.cpp rounds; or "
        "bf16, as it is, which is slower."
    ),
]
Exits = Annotated[bool, typer.Option(help="Let tokens exit early.")]
Adaptive = Annotated[
    bool, typer.Option(help="Use each mechanism only where it is measured to pay.")
]
Attends = Annotated[
    str,
    typer.Option(
        "--context",
        help="What tokens attend to in a long text: full; or, with --guarantee approximate, "
        "selected or recent tokens.",
    ),
]
ContextTokens = Annotated[int, typer.Option(help="How many tokens of a long text are selected.")]
Kv = Annotated[str, typer.Option(help="defer, propagate or drop.")]
Dense = Annotated[bool, typer.Option("--dense", help="Run every layer for every token.")]
NewTokens = Annotated[int, typer.Option(help="Tokens of an answer, at most.", min=1)]
Temperature = Annotated[float, typer.Option(help="0 is greedy.", min=0)]
TopK = Annotated[int, typer.Option(help="0 keeps all tokens.", min=0)]
TopP = Annotated[float, typer.Option(min=0, max=1)]
MinP = Annotated[float, typer.Option(min=0, max=1)]
RepetitionPenalty = Annotated[float, typer.Option(help="1 is none.")]
Seed = Annotated[int | None, typer.Option(help="The same seed samples the same.")]


def exit_config(preset: str, **options: Any) -> Any:
    """The ``ExitConfig`` of a preset with ``options``; ``ValueError`` for what is not allowed."""
    from eepass.config import ExitConfig

    base = ExitConfig.preset(preset)
    if preset == "paper":
        # the published method leaves no other choices
        options = {k: v for k, v in options.items() if k in ("target_agreement", "kv")}
    return replace(base, **options)
