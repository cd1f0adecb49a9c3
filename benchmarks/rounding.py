"""What rounding rows costs in quality: eepass and llama.cpp beside the dequantised model.

    python benchmarks/rounding.py MODEL [--text FILE ...] [--chunks 4] [--length 512] [--json FILE]

MODEL: smollm2 or a GGUF file. Chunks of a text go through the model with its weights dequantised,
in float32, through eepass over the weights as they are stored (rows rounded, and with
``activations="bf16"`` not), and through llama.cpp on the same file. Of each: the negative
log-likelihood of the text's tokens in nats, and against the dequantised model the divergence
(Kullback-Leibler, nats a token) and the share of tokens with the same likeliest next one.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # a checkout need not be installed
    sys.path[0] = str(ROOT)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import eepass  # noqa: E402
from eepass.checkpoints.models import gguf_of  # noqa: E402
from eepass.cli.console import errors, table  # noqa: E402
from eepass.errors import InputError  # noqa: E402

# logits [T, V] of a chunk's tokens
Logits = Callable[[list[int]], Tensor]
TEXTS = [ROOT / "docs" / name for name in ("how.md", "training.md", "security.md", "kernel.md")]
REFERENCE = "dequantised, float32"


def dequantised(model: str) -> Logits:
    plain = eepass.load(model, "fp32", quantize=None).model
    return lambda ids: plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def rounded(model: str, activations: str, length: int) -> Logits:
    """eepass, over the weights as they are stored."""
    loaded = eepass.load(model, quantize="keep", activations=activations)
    engine = eepass.transform(loaded.model, max_length=length + 8).dense
    decoder = engine.decoder

    def logits(ids: list[int]) -> Tensor:
        found: list[Tensor] = []

        def keep(layer: int, hidden: Tensor) -> None:
            if layer == decoder.num_layers:
                found.extend(
                    decoder.logits(part)[0].float().clone() for part in hidden.split(16, 1)
                )

        engine.prefill(ids, keep)
        return torch.cat(found)

    return logits


def llama_cpp(file: Path, length: int) -> Logits:
    from llama_cpp import Llama

    llama = Llama(str(file), n_ctx=length + 8, n_batch=length, logits_all=True, verbose=False)

    def logits(ids: list[int]) -> Tensor:
        llama.reset()
        llama.eval(ids)
        return torch.from_numpy(llama.scores[: len(ids)].copy())

    return logits


def systems(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Logits]]]:
    yield REFERENCE, lambda: dequantised(options.model)
    for activations in ("int8", "bf16"):
        name = f"eepass, activations={activations}"
        yield name, lambda kind=activations: rounded(options.model, kind, options.length)  # type: ignore[misc]
    yield "llama.cpp", lambda: llama_cpp(gguf_of(options.model), options.length)


def compared(logits: Tensor, wanted: Tensor, ids: Tensor) -> dict[str, float]:
    """Figures of logits [T, V] after tokens ids [T], against ``wanted``."""
    own, reference = logits.log_softmax(-1), wanted.log_softmax(-1)
    likelihood = own[:-1].gather(1, ids[1:, None])
    return {
        "nll": -likelihood.mean().item(),
        "divergence": (reference.exp() * (reference - own)).sum(-1).mean().item(),
        "same": (own.argmax(-1) == reference.argmax(-1)).float().mean().item(),
    }


@torch.no_grad()
def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    tokenizer = eepass.load(options.model, quantize="keep").tokenizer
    text = "\n".join(path.read_text() for path in options.text)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    chunks = list(ids.split(options.length)[: options.chunks])
    if len(chunks[-1]) < 2:
        raise InputError(f"the text has {len(ids)} tokens: give more, or a smaller --length")
    wanted: list[Tensor] = []
    report: dict[str, dict[str, float]] = {}
    for name, make in systems(options):
        try:
            logits = make()
        except ImportError as error:
            errors.print(f"{name}: left out ({error})")
            continue
        found = [logits(chunk.tolist()) for chunk in chunks]
        del logits
        gc.collect()
        wanted = wanted or found
        each = [compared(*three) for three in zip(found, wanted, chunks, strict=True)]
        weights = [len(chunk) / sum(map(len, chunks)) for chunk in chunks]
        report[name] = {
            key: sum(weight * one[key] for weight, one in zip(weights, each, strict=True))
            for key in each[0]
        }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, nargs="+", default=TEXTS)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = measure(options)
    rows = [
        (name, f"{row['nll']:.4f}", f"{row['divergence']:.4f}", f"{row['same']:.3f}")
        for name, row in report.items()
    ]
    table("rounding", ("", "nll", "divergence", "same token"), rows)
    if options.json:
        about: dict[str, Any] = {"model": Path(options.model).name, "chunks": options.chunks}
        text = json.dumps({**about, "length": options.length, "systems": report}, indent=1)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
