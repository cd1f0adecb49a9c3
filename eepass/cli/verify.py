"""``eepass verify``: a certificate that every way of decoding says what dense decoding says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from eepass.cli import options
from eepass.cli.command import command, load_model, transform_model, write_json
from eepass.cli.console import console, progress_bars, table


@command
def verify(
    model: options.Model,
    artifact: options.ArtifactDir = None,
    drafts_alone: options.DraftsAlone = False,
    quantize: options.Quantize = "none",
    activations: options.Activations = "int8",
    prompts: options.Prompts = None,
    limit: Annotated[int, typer.Option(help="At most so many prompts.", min=1)] = 16,
    new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.", min=2)] = 64,
    seed: Annotated[int, typer.Option(help="Of what is random: company, sampling.", min=0)] = 0,
    raw: options.Raw = False,
    json_file: options.Json = None,
    dtype: options.Dtype = None,
    threads: options.Threads = 0,
    trust_native: options.Trust = False,
    debug: options.Debug = False,
) -> dict[str, Any]:
    """Compare every way of decoding MODEL with dense decoding: token by token, bit by bit.

    Drafts, exits, both, in batches with random company, joining at random, in other slots, sampled
    with seeds, with one thread. Ends with exit code 1 if anything differs.
    """
    from eepass.config import ExitConfig
    from eepass.exactness import certificate
    from eepass.lengths import usual_length
    from eepass.training.corpus import read_prompts
    from eepass.training.train import DEFAULT_PROMPTS

    texts = read_prompts(prompts or DEFAULT_PROMPTS, limit)
    loaded = load_model(model, dtype, threads, trust_native, quantize, activations)
    ids = [loaded.encode(text, raw) for text in texts]
    room = None
    if not loaded.transformed:
        room = usual_length(loaded.model, certificate.slots_needed(ids, new_tokens))
    ready = transform_model(loaded, artifact, ExitConfig(), room, drafts_alone=drafts_alone)
    with progress_bars() as bars:
        found = certificate.verify(loaded, ready, ids, new_tokens, seed, bars.notify)
    show(found)
    if not found["exact"]:
        write_json(json_file, found)
        raise typer.Exit(1)
    return found


def show(found: Mapping[str, Any]) -> None:
    """The certificate; ``--json`` has where what differs does so first."""
    ways, bits = found["ways"], found["bits"]
    table(
        f"{found['model']}: {found['prompts']} prompts x {found['new_tokens']} tokens, "
        f"{found['quantized'] or found['dtype']}, {found['isa']}, {found['threads']} threads",
        ("against dense, alone", "answers", "tokens a pass", "layers", "differ"),
        [
            (
                way["way"],
                str(way["answers"]),
                f"{way['accepted_per_pass']:.2f}",
                f"{way['mean_exit_layer']:.1f}",
                str(way["different"] + (way["bits_different"] if bits else 0)),
            )
            for way in ways
        ],
    )
    console.print(verdict(found), style="bold", highlight=False)


def verdict(found: Mapping[str, Any]) -> str:
    """One sentence: exact or not, and of what."""
    ways, tokens = found["ways"], sum(way["tokens"] for way in found["ways"])
    compared = "every token" + (", key, value and logit" if found["bits"] else "")
    if found["exact"]:
        said = f"exact: {tokens} tokens in {len(ways)} ways, {compared} the dense one"
    else:
        counts = ("different", "bits_different") if found["bits"] else ("different",)
        wrong = [way["way"] for way in ways if any(way[count] for count in counts)]
        said = f"NOT exact: {', '.join(wrong)}: other than dense"
    if not found["bits"]:
        ties = sum(way["near_ties"] for way in ways)
        said += (
            f"; no kernels that promise bits here: logits of different row counts differ by up to "
            f"{found['noise']:.2g}, and {ties} tokens were that close to another"
        )
    return said + "."
