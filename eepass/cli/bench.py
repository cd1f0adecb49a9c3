"""``eepass probe`` and ``eepass bench``: what early exit could bring a model, and what it does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from eepass.cli import options
from eepass.cli.command import command, load_model, transform_model
from eepass.cli.console import console, progress_bars, speed_up, table
from eepass.errors import InputError


@command
def probe(
    model: options.Model,
    prompts: options.Prompts = None,
    limit: Annotated[int, typer.Option(help="At most so many prompts.", min=1)] = 16,
    new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    translate: Annotated[
        bool, typer.Option("--translate", help="Also fit translators, quickly.")
    ] = False,
    picture: Annotated[Path | None, typer.Option(help="PNG or SVG of agreement by layer.")] = None,
    raw: options.Raw = False,
    json_file: options.Json = None,
    dtype: options.Dtype = None,
    threads: options.Threads = 0,
    trust_native: options.Trust = False,
    debug: options.Debug = False,
) -> dict[str, Any]:
    """Report whether early exit will pay for MODEL: how early answers are known, what it allows."""
    from eepass import pictures
    from eepass.benchmark import probe as probing
    from eepass.training.corpus import read_prompts
    from eepass.training.train import DEFAULT_PROMPTS

    texts = read_prompts(prompts or DEFAULT_PROMPTS, limit)
    loaded = load_model(model, dtype, threads, trust_native)
    with console.status("measuring agreement by layer"):
        report = probing.probe(loaded, texts, new_tokens, translate, raw)
    show_probe(report, model)
    picture = picture or Path("eepass-probe.png")
    pictures.agreement(report, picture, model)
    console.print(f"picture: {picture}")
    return report


def show_probe(report: Mapping[str, Any], model: str) -> None:
    translated = report.get("translated", {}).get("agreement_by_layer", {})
    rows = []
    for layers, agreement in enumerate(report["agreement_by_layer"], 1):
        fitted = translated.get(str(layers))
        if fitted is not None or layers % 3 == 0 or layers > report["layers"] - 6:
            cells = [str(layers), f"{agreement:.3f}"]
            if translated:
                cells.append("" if fitted is None else f"{fitted:.3f}")
            rows.append(cells)
    table(
        f"{model}: {report['tokens']} tokens of {report['prompts']} answers",
        ("layers run", "agreement", *(["translated"] if translated else [])),
        rows,
    )
    console.print(
        f"LM head {report['lm_head_layers']:.2f} layers, draft {report['draft_layers']:.2f}; "
        f"bound {report['bound']:.2f}x, with hot verification {report['bound_hot']:.2f}x"
    )
    console.print(report["verdict"], style="bold")


@command
def bench(
    model: options.Model,
    artifact: options.ArtifactDir = None,
    quantize: options.Quantize = "none",
    activations: options.Activations = "int8",
    prompts: options.Prompts = None,
    limit: Annotated[int, typer.Option(help="At most so many prompts or problems.", min=1)] = 16,
    new_tokens: Annotated[int, typer.Option(min=4)] = 128,
    preset: options.Preset = "default",
    target_agreement: options.Target = 0.98,
    task: Annotated[
        tuple[str, Path] | None,
        typer.Option(
            help="mbpp and a file of problems, JSONL with prompt, setup and tests: instead of "
            "times, the share of them that is solved. Needs --run-code.",
            metavar="NAME FILE",
        ),
    ] = None,
    run_code: Annotated[
        bool,
        typer.Option(
            "--run-code",
            help="Run the code of answers and the tests of the file, without network, and without "
            "a file it could change.",
        ),
    ] = False,
    frontier: Annotated[bool, typer.Option(help="Measure agreement against speed.")] = True,
    baselines: Annotated[bool, typer.Option(help="Measure Hugging Face as well.")] = True,
    beside: Annotated[
        list[str] | None,
        typer.Option("--with", help="Another system: llama.cpp, plain and with its look-up."),
    ] = None,
    max_length: options.MaxLength = None,
    raw: options.Raw = False,
    json_file: options.Json = None,
    dtype: options.Dtype = None,
    threads: options.Threads = 0,
    trust_native: options.Trust = False,
    debug: options.Debug = False,
) -> dict[str, Any]:
    """Measure speculation and early exit beside dense, compiled and eager, with their quality."""
    import torch

    from eepass.benchmark import bench as benchmarking
    from eepass.benchmark import tasks
    from eepass.benchmark.baselines import LlamaCpp
    from eepass.checkpoints.models import gguf_of
    from eepass.lengths import usual_length
    from eepass.training.corpus import read_prompts
    from eepass.training.train import DEFAULT_PROMPTS

    if unknown := sorted(set(beside or []) - {benchmarking.LLAMA}):
        raise InputError(f"--with {unknown[0]}: expected {benchmarking.LLAMA}")
    problems = _problems(*task, run_code, limit) if task is not None else []
    texts = read_prompts(prompts or DEFAULT_PROMPTS, limit) if task is None else []
    config = options.exit_config(preset, target_agreement=target_agreement)
    loaded = load_model(model, dtype, threads, trust_native, quantize, activations)
    if max_length is None and not loaded.transformed:
        each = benchmarking.MAX_PROMPT + new_tokens
        together = tasks.TOGETHER if task is not None else 1
        max_length = usual_length(loaded.model, together * each)
    ready = transform_model(loaded, artifact, config, max_length)
    if task is not None:
        with progress_bars() as bars:
            solved = tasks.measure_task(
                loaded, ready, problems, new_tokens, config, raw, bars.notify
            )
        show_task(solved, task[0])
        return {"model": loaded.name, "task": task[0], **solved}
    others: dict[str, Any] = {}
    if beside:
        cores, context = threads or torch.get_num_threads(), ready.decoder.max_sequence_length
        for name, look_up in (("", False), ("-look-up", True)):
            others[benchmarking.LLAMA + name] = LlamaCpp(gguf_of(model), cores, context, look_up)
    with progress_bars() as bars:
        result = benchmarking.bench(
            loaded, ready, texts, new_tokens, config, raw, frontier, baselines, others, bars.notify
        )
    show(result)
    return result


def _problems(name: str, file: Path, run_code: bool, limit: int) -> list[Any]:
    """The problems of ``file``, if the person wants code to be run."""
    from eepass.benchmark import tasks

    if name not in tasks.TASKS:
        raise InputError(f"--task {name}: expected {', '.join(tasks.TASKS)}")
    if not run_code:
        raise InputError(
            "--task runs code that the model writes, and the tests of the file, on this machine "
            "(without network, unable to change a file): say --run-code if that is what you want"
        )
    return tasks.read_problems(file, limit)


def show_task(found: Mapping[str, Any], name: str) -> None:
    table(
        f"{name}: {found['problems']} problems, answers of at most {found['new_tokens']} tokens",
        ("system", "solved", "same answer as dense"),
        [
            (system, f"{100 * figures['pass_at_1']:.1f} %", f"{100 * figures['same_answer']:.1f} %")
            for system, figures in found["systems"].items()
        ],
    )


def show(result: Mapping[str, Any]) -> None:
    """The tables of a benchmark; ``--json`` has the other figures."""
    systems, reference = result["systems"], result["reference"]
    ratios = {f"vs {reference.removeprefix('eepass-')}": "ratios", "vs dense": "ratios_to_dense"}
    table(
        f"{result['model']}: {result['prompts']} prompts x {result['new_tokens']} tokens, "
        f"{result['dtype']}, {result['threads']} threads",
        ("system", "ms/token", *ratios),
        [
            (
                name,
                f"{figures['ms_per_token']:.2f}",
                *(speed_up(result[r][name], result[f"{r}_spread"][name]) for r in ratios.values()),
            )
            for name, figures in systems.items()
        ],
    )
    if "ratios_to_llama" in result:
        beside = zip(
            result["ratios_to_llama"].items(), result["ratios_to_llama_spread"].values(),
            strict=True,
        )  # fmt: skip
        table(
            "beside llama.cpp, the same file",
            ("system", "vs llama.cpp"),
            [(name, speed_up(value, spread)) for (name, value), spread in beside],
        )
    console.print(
        f"A ratio is the median of blocks of {result['block_tokens']} tokens, systems in turns; "
        "in brackets the middle half of them. Above 1 is faster.",
        highlight=False,
    )
    table(
        "answers",
        ("system", "tokens/pass", "exit layer", "agreement", "same text"),
        [
            (
                name, f"{figures['accepted_per_pass']:.2f}", f"{figures['mean_exit_layer']:.1f}",
                f"{figures['agreement']:.3f}", f"{figures['exact_match']:.2f}",
            )
            for name, figures in systems.items()
            if "agreement" in figures
        ],
    )  # fmt: skip
    if result["by_position"]:
        table(
            "early exit along the dense answer, by position in the answer",
            ("tokens", "count", "agreement", "exit layer"),
            [
                (f"{s['first']} to {s['last']}", str(s["tokens"]), f"{s['agreement']:.4f}",
                 f"{s['mean_exit_layer']:.1f}")
                for s in result["by_position"]
            ],
        )  # fmt: skip
    if result["frontier"]:
        table(
            "early exit along the dense answer, by target",
            ("preset", "target", "agreement", "exit layer", "vs dense"),
            [
                (
                    p["preset"], f"{p['target']:.3f}", f"{p['agreement']:.4f}",
                    f"{p['mean_exit_layer']:.1f}",
                    speed_up(p["ratio_to_dense"], p["ratio_to_dense_spread"]),
                )
                for p in result["frontier"]
            ],
        )  # fmt: skip
