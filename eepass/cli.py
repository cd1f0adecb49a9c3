"""The command line: ``eepass probe | train | transform | generate | bench | inspect | …``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from eepass.errors import InputError
from eepass.onnx_files import is_onnx
from eepass.requests import config_of, numbers, other_systems

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Speculative early exit for any decoder PyTorch can trace.",
)

Model = Annotated[
    str,
    typer.Argument(
        help="Hugging Face folder or id, a .gguf file, smollm2, or a folder eepass transform wrote."
    ),
]
Device = Annotated[str, typer.Option(help="Where to run; this runtime is for the CPU.")]
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
ArtifactDir = Annotated[Path | None, typer.Option("--artifact", help="Folder eepass train wrote.")]
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
    float, typer.Option(help="Agreement with the dense answer to keep, where that is approximate.")
]
Guarantee = Annotated[str, typer.Option(help="exact: the dense answer; approximate: as published.")]
Speculate = Annotated[
    str, typer.Option(help="Who drafts tokens ahead: cascade, eagle, ngram, lens or off.")
]
Quantize = Annotated[
    str,
    typer.Option(
        help="keep: a GGUF file's own, where there are kernels for it; none: bf16 or fp32; "
        "int8, int4 or int8-dynamic: with torchao."
    ),
]
Exits = Annotated[bool, typer.Option(help="Let tokens leave early.")]


@app.command()
def probe(
    model: Model,
    prompts: Prompts = None,
    limit: Annotated[int, typer.Option(help="At most so many prompts.", min=1)] = 16,
    new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    translate: Annotated[
        bool, typer.Option("--translate", help="Also fit translators, quickly.")
    ] = False,
    picture: Annotated[Path | None, typer.Option(help="PNG or SVG of agreement by layer.")] = None,
    raw: Raw = False,
    json_file: Json = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = 0,
    trust_native: Trust = False,
    debug: Debug = False,
) -> None:
    """Say whether early exit will pay for MODEL: where answers are known, what that allows."""

    def work() -> None:
        from eepass import pictures, probing
        from eepass.console import console, table
        from eepass.training.corpus import read_prompts
        from eepass.training.door import DEFAULT_PROMPTS

        texts = read_prompts(prompts or DEFAULT_PROMPTS, limit)
        loaded = _load(model, dtype, device, threads, trust_native)
        with console.status("measuring agreement by layer"):
            report = probing.probe(loaded, texts, new_tokens, translate, raw)
        table(
            f"{model}: {report['tokens']} tokens of {report['prompts']} answers",
            ("layers run", "agreement"),
            [
                (str(n), f"{a:.3f}")
                for n, a in enumerate(report["agreement_by_layer"], 1)
                if n % 3 == 0 or n > report["layers"] - 6
            ],
        )
        console.print(
            f"LM head {report['lm_head_layers']:.2f} layers, draft {report['draft_layers']:.2f}; "
            f"bound {report['bound']:.2f}x, with hot verification {report['bound_hot']:.2f}x"
        )
        if "translated" in report:
            console.print("translated:", report["translated"]["agreement_by_layer"])
        console.print(report["verdict"], style="bold")
        pictures.agreement(report, picture or Path("eepass-probe.png"), model)
        console.print(f"picture: {picture or 'eepass-probe.png'}")
        _write_json(json_file, report)

    _run(work, debug)


@app.command()
def train(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the artefact; resumed if it has begun.")],
    prompts: Prompts = None,
    tokens: Annotated[int, typer.Option(help="Answer tokens to generate.", min=1000)] = 200_000,
    answers: Annotated[
        Path | None, typer.Option(help="The model's own answers as JSONL, instead of generating.")
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Further answers to each prompt, sampled.", min=0)
    ] = 0,
    temperature: Annotated[float, typer.Option(help="What they are sampled at.", min=0.1)] = 0.7,
    own_prompts: Annotated[
        int, typer.Option(help="Prompts the model writes itself, beside those given.", min=0)
    ] = 0,
    draft: Annotated[str, typer.Option(help="Draft head: eagle, or none.")] = "eagle",
    steps: Annotated[int, typer.Option(help="Drafts in a row the head is trained for.", min=1)] = 4,
    raw: Raw = False,
    max_length: Annotated[
        int, typer.Option(help="What is longer is cut here, in tokens.", min=64)
    ] = 512,
    json_file: Json = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = 0,
    debug: Debug = False,
) -> None:
    """Train translators, draft head, predictors and thresholds for MODEL, on its own answers."""

    def work() -> None:
        from eepass.console import console, progress_bars, table
        from eepass.training import door

        loaded = _load(model, dtype, device, threads)
        with progress_bars() as bars:
            artifact = door.train(
                loaded, out, prompts, tokens, answers, raw, max_length, samples, temperature,
                _draft(draft), steps, own_prompts, progress=bars,
            )  # fmt: skip
        for name, part in artifact.presets.items():
            table(
                f"{name}: expected on held-out answers",
                ("target", "agreement", "exit layer", "speed-up (bytes)"),
                [
                    (f"{c.target}", f"{c.agreement:.4f}", f"{c.mean_exit_layer:.1f}",
                     f"{c.speedup:.2f}x")
                    for c in part.calibrations
                ],
            )  # fmt: skip
        console.print(f"artefact: {out}")
        _write_json(json_file, dict(artifact.report))

    _run(work, debug)


@app.command()
def calibrate(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the artefact with new thresholds.")],
    artifact: ArtifactDir = None,
    quantize: Quantize = "keep",
    prompts: Prompts = None,
    tokens: Annotated[int, typer.Option(help="Answer tokens to look at.", min=200)] = 4000,
    raw: Raw = False,
    json_file: Json = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = 0,
    debug: Debug = False,
) -> None:
    """Find an artefact's thresholds anew for MODEL quantised; trains nothing, takes minutes."""

    def work() -> None:
        from eepass.console import console

        loaded = _load(model, dtype, device, threads, quantize=quantize)
        made = _calibrated(loaded, artifact, out, prompts, tokens, raw)
        console.print(f"artefact: {out}", highlight=False)
        _write_json(json_file, dict(made.report))

    _run(work, debug)


@app.command()
def transform(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write; a transformed one is replaced.")],
    artifact: ArtifactDir = None,
    quantize: Quantize = "keep",
    rows: Annotated[
        str, typer.Option(help="Row counts to compile for: 1, and how many tokens go in a pass.")
    ] = "1,4,8,16",
    max_length: MaxLength = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Leave the artefact out: no token leaves early.")
    ] = False,
    gpu: Annotated[
        list[str] | None, typer.Option(help="Also hold kernels for this GPU: sm_80 to sm_90.")
    ] = None,
    json_file: Json = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = 0,
    debug: Debug = False,
) -> None:
    """Write MODEL as a folder that runs at once: compiled, signed, without transformers."""

    def work() -> None:
        from eepass.console import console
        from eepass.offline import write_folder

        sizes = numbers(rows, "--rows")
        loaded = _load(model, dtype, device, threads, quantize=quantize)
        folder = None if dense else artifact or loaded.artifact
        if not dense and loaded.before is not None and artifact is None:
            folder = _calibrated(loaded, None)
        with console.status("transforming") as status:
            report = write_folder(loaded, out, folder, sizes, max_length, status.update, gpu or ())
        size = sum(report["compiled"].values()) / 1e6
        console.print(
            f"{len(report['compiled'])} libraries, {size:.1f} MB of code, in {report['seconds']} s"
        )
        console.print(f"transformed: {out}; eepass generate {out} --prompt ...", highlight=False)
        _write_json(json_file, report)

    _run(work, debug)


@app.command()
def generate(
    context: typer.Context,
    model: Model,
    prompt: Annotated[str, typer.Option(help="What to answer.")],
    artifact: ArtifactDir = None,
    quantize: Quantize = "keep",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    dense: Annotated[
        bool, typer.Option("--dense", help="Run every layer for every token.")
    ] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Show where tokens left, what was chosen and why.")
    ] = False,
    preset: Preset = "default",
    guarantee: Guarantee = "exact",
    speculate: Speculate = "cascade",
    exits: Exits = True,
    adaptive: Annotated[
        bool, typer.Option(help="Use each mechanism only where it is measured to pay.")
    ] = True,
    target_agreement: Target = 0.98,
    kv: Annotated[str, typer.Option(help="defer, propagate or drop.")] = "defer",
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all tokens.", min=0)] = 0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    min_p: Annotated[float, typer.Option(min=0, max=1)] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 is none.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same.")] = None,
    dump: Annotated[Path | None, typer.Option(help="Write the graphs of each pass here.")] = None,
    raw: Raw = False,
    json_file: Json = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = 0,
    trust_native: Trust = False,
    debug: Debug = False,
) -> None:
    """Answer one prompt, each token tinted by the layer it left at; MODEL may be an ONNX file."""

    def work() -> None:
        if is_onnx(model):
            from eepass import onnx_commands

            answer = onnx_commands.generate(
                context, model, prompt, max_new_tokens, dense, stats, raw, device, threads
            )
            return _write_json(json_file, answer)
        from eepass.console import LiveAnswer, console, table
        from eepass.lengths import refuse_longer
        from eepass.runtime.sampling import Sampling

        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        config = config_of(
            preset, guarantee=guarantee, speculate=speculate, exits=exits, adaptive=adaptive,
            target_agreement=target_agreement, kv=kv,
        )  # fmt: skip
        loaded = _load(model, dtype, device, threads, trust_native, quantize)
        ids = loaded.encode(prompt, raw)
        length = len(ids) + max_new_tokens
        if not loaded.transformed:
            refuse_longer(loaded.model, length, "prompt and answer together")
        ready = _transform(loaded, None if dense else artifact, dense, config, length, dump)
        engine = ready.dense if dense else ready.engine
        steps = []
        show = LiveAnswer(_decoder(loaded), ready.decoder.num_layers, model)
        with show if console.is_terminal else nullcontext():
            for step in engine.generate(ids, max_new_tokens, loaded.stop, sampling):
                steps.append(step)
                if console.is_terminal and step.token not in loaded.stop:
                    show.add(*step)
        text = loaded.tokenizer.decode([s.token for s in steps], skip_special_tokens=True)
        if not console.is_terminal:
            sys.stdout.write(text + "\n")
        summary = engine.statistics.summary()
        if stats:
            table(
                "where tokens left",
                ("layers run", "tokens"),
                [(str(n), str(c)) for n, c in enumerate(summary["exit_layers"]) if c],
            )
            console.print({k: v for k, v in summary.items() if k != "exit_layers"})
            console.print("chosen by measured cost and acceptance:", engine.planner.decision())
        found = {**summary, "text": text, "ids": [s.token for s in steps]}
        _write_json(json_file, {**found, "decision": engine.planner.decision()})

    _run(work, debug)


@app.command()
def bench(
    model: Model,
    artifact: ArtifactDir = None,
    prompts: Prompts = None,
    limit: Annotated[int, typer.Option(help="At most so many prompts.", min=1)] = 16,
    new_tokens: Annotated[int, typer.Option(min=4)] = 128,
    preset: Preset = "default",
    target_agreement: Target = 0.98,
    frontier: Annotated[bool, typer.Option(help="Measure agreement against speed.")] = True,
    baselines: Annotated[bool, typer.Option(help="Measure Hugging Face as well.")] = True,
    beside: Annotated[
        list[str] | None, typer.Option("--with", help="Another system: llama.cpp.")
    ] = None,
    max_length: MaxLength = None,
    raw: Raw = False,
    json_file: Json = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = 0,
    trust_native: Trust = False,
    debug: Debug = False,
) -> None:
    """Measure speculation and early exit beside dense, compiled and eager, with their quality."""

    def work() -> None:
        from eepass import benchmarking
        from eepass.console import progress_bars, show_bench
        from eepass.lengths import usual_length
        from eepass.training.corpus import read_prompts
        from eepass.training.door import DEFAULT_PROMPTS

        texts = read_prompts(prompts or DEFAULT_PROMPTS, limit)
        config = config_of(preset, target_agreement=target_agreement)
        loaded = _load(model, dtype, device, threads, trust_native)
        length = max_length
        if length is None and not loaded.transformed:
            length = usual_length(loaded.model, benchmarking.MAX_LENGTH)
        ready = _transform(loaded, artifact, False, config, length)
        others = other_systems(beside or [], model, threads, ready.decoder.longest)
        with progress_bars() as bars:
            result = benchmarking.bench(
                loaded, ready, texts, new_tokens, config, raw, frontier, baselines, others,
                bars.notify,
            )  # fmt: skip
        show_bench(result)
        _write_json(json_file, result)

    _run(work, debug)


@app.command()
def inspect(
    context: typer.Context,
    model: Model,
    artifact: ArtifactDir = None,
    quantize: Quantize = "keep",
    picture: Annotated[Path | None, typer.Option(help="SVG or PNG of the exit graph.")] = None,
    code: Annotated[bool, typer.Option("--code", help="Print the exit graph as code.")] = False,
    preset: Preset = "default",
    target_agreement: Target = 0.98,
    dump: Annotated[Path | None, typer.Option(help="Write the graphs of each pass here.")] = None,
    json_file: Json = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = 0,
    trust_native: Trust = False,
    debug: Debug = False,
) -> None:
    """Show layers, segments, exits and the exit graph of MODEL, or of an ONNX file."""

    def work() -> None:
        if is_onnx(model):
            from eepass import onnx_commands

            return _write_json(json_file, onnx_commands.inspect(context, model))
        from eepass import inspecting, pictures
        from eepass.console import console
        from eepass.lengths import usual_length

        config = config_of(preset).approximate(target_agreement)
        loaded = _load(model, dtype, device, threads, trust_native, quantize)
        length = None if loaded.transformed else usual_length(loaded.model, 192)
        ready = _transform(loaded, artifact, False, config, length, dump, exits_optional=True)
        found = inspecting.describe(ready)
        for name, value in found.items():
            if name == "exits":
                console.print(f"exits: {[e['layer'] for e in value]}")
            else:
                console.print(f"{name}: {value}", highlight=False)
        if picture is not None:
            pictures.exit_graph(ready.splits[1], ready.plan, picture, model)
            console.print(f"picture: {picture}")
        if code:
            sys.stdout.write(inspecting.code_of(ready) + "\n")
        _write_json(json_file, found)

    _run(work, debug)


@app.command()
def codegen(
    model: Model,
    target: Annotated[str, typer.Option(help="sm_80, sm_86, sm_89 or sm_90.")] = "sm_90",
    artifact: ArtifactDir = None,
    rows: Annotated[int, typer.Option(help="Rows in a pass, 1 to 32.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder for the compiled kernels.")] = None,
    json_file: Json = None,
    dtype: Dtype = "bf16",
    debug: Debug = False,
) -> None:
    """Generate MODEL's GPU kernels and compile them; needs no GPU."""

    def work() -> None:
        from eepass import ahead_of_time
        from eepass.console import console, table

        ahead_of_time.capability_of(target)
        loaded = _load(model, dtype, "cpu", 0)
        with console.status(f"compiling for {target}"):
            found = ahead_of_time.compile_kernels(
                loaded.model, artifact or loaded.artifact, target, rows, out
            )
        table(
            f"{model} on {target}, {rows} rows: predicted, not measured",
            ("kernel", "registers", "spills", "shared", "bytes", "µs"),
            [(name, *(str(value) for value in k.values())) for name, k in found["kernels"].items()],
        )
        _write_json(json_file, found)

    _run(work, debug)


@app.command()
def families(
    only: Annotated[
        list[str] | None, typer.Argument(help="Families to check; all if none.")
    ] = None,
    compiler: Annotated[
        str, typer.Option(help="graph: run what was traced as it is; inductor: compile it.")
    ] = "graph",
    docs: Annotated[
        Path | None, typer.Option(help="Also write the table here, as Markdown.")
    ] = None,
    json_file: Json = None,
    threads: Threads = 0,
    debug: Debug = False,
) -> None:
    """Show which decoder families can be transformed, each on a small random model."""

    def work() -> None:
        from eepass.families_report import report

        failed = report(only or [], compiler, docs, json_file, threads, _write_json)
        if failed:
            raise InputError(f"not as expected: {', '.join(failed)}")

    _run(work, debug)


@app.command()
def export_onnx(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write; an exported one is replaced.")],
    artifact: ArtifactDir = None,
    preset: Preset = "default",
    target_agreement: Target = 0.98,
    kv: Annotated[
        str, typer.Option(help="Skipped layers' keys and values: propagate or drop.")
    ] = "propagate",
    max_length: MaxLength = None,
    json_file: Json = None,
    threads: Threads = 0,
    trust_native: Trust = False,
    debug: Debug = False,
) -> None:
    """Write MODEL and its exits as ONNX in fp32: decode.onnx, prefill.onnx, their weights once."""

    def work() -> None:
        from eepass import onnx_commands
        from eepass.console import console

        transformed = (Path(model) / "transformed.json").exists()
        loaded = _load(model, None if transformed else "fp32", "cpu", threads, trust_native)
        with console.status("exporting") as status:
            report = onnx_commands.export(
                loaded, out, artifact, preset, target_agreement, kv, max_length, status.update
            )
        console.print(
            f"exported in {report['seconds']} s: eepass generate {out / 'decode.onnx'} "
            "--prompt ...",
            highlight=False,
        )
        _write_json(json_file, report)

    _run(work, debug)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Say it as JSON.")] = False,
) -> None:
    """Say what is installed here, what eepass will use of it and why, and what is missing."""
    from eepass import doctoring

    found = doctoring.doctor()
    text = json.dumps(found, indent=1) if as_json else doctoring.as_text(found)
    sys.stdout.write(text + "\n")
    if not found["ready"]:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the ``eepass`` command."""
    app()


def _draft(name: str) -> Any:
    if name not in ("eagle", "none"):
        raise InputError(f"--draft {name}: expected eagle or none")
    return name


def _load(
    model: str,
    dtype: str | None,
    device: str,
    threads: int,
    trust_native: bool = False,
    quantize: str = "none",
) -> Any:
    import torch

    from eepass import models
    from eepass.console import console, errors

    models.check_device(device)
    if threads:
        torch.set_num_threads(threads)
    with console.status(f"loading {model}"):
        wanted = None if quantize == "none" else quantize
        loaded = models.load(model, dtype, device, trust_native, wanted)
    if "dequantised" in loaded.form:
        errors.print(f"{model}: {loaded.form}", highlight=False, markup=False)
    return loaded


def _calibrated(
    loaded: Any,
    artifact: Path | None,
    out: Path | None = None,
    prompts: Path | None = None,
    tokens: int = 4000,
    raw: bool = False,
) -> Any:
    from eepass.console import progress_bars
    from eepass.training.recalibration import calibrate

    source = artifact or loaded.before or loaded.artifact
    if source is None:
        raise InputError(f"{loaded.name} has no artefact to calibrate: give --artifact DIR")
    with progress_bars() as bars:
        return calibrate(loaded, source, out, prompts, tokens, raw, progress=bars)


def _transform(
    loaded: Any,
    artifact: Path | None,
    dense: bool,
    config: Any,
    max_length: int | None,
    dump: Path | None = None,
    exits_optional: bool = False,
) -> Any:
    from eepass.console import console
    from eepass.transformation import transform

    folder = None if dense else artifact or loaded.artifact
    if folder is None:
        # what needs no training: lossless, drafts from the prompt
        if config.guarantee == "approximate" and (dense or exits_optional):
            config = None
        exits_optional |= config is None or config.guarantee == "exact"
    if folder is None and not dense and not exits_optional:
        raise InputError(
            f"{loaded.name} has no artefact: run eepass train {loaded.name} --out DIR and give "
            "--artifact DIR, or ask for --dense"
        )
    with console.status("tracing, splitting and compiling"):
        return transform(loaded.model, folder, config, max_length, loaded.stop, dump)


def _decoder(loaded: Any) -> Callable[[list[int]], str]:
    return lambda ids: str(loaded.tokenizer.decode(ids, skip_special_tokens=True))


def _write_json(file: Path | None, value: Any) -> None:
    if file is None:
        return
    from eepass.training.boundaries import write_text

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(value, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror})") from error


def _run(work: Callable[[], None], debug: bool) -> None:
    """Run a command: what the person can mend is one line and exit code 2."""
    from eepass.console import errors

    try:
        work()
    except KeyboardInterrupt:
        errors.print(
            "stopped: run the same command again to go on (a training resumes where it was)"
        )
        raise typer.Exit(2) from None
    except (ValueError, OSError) as error:
        # InputError, EngineError and PassError are ValueErrors, as are refused options
        if debug:
            raise
        errors.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
