"""``eepass serve``: a model behind the OpenAI protocol, until Ctrl-C or SIGTERM."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from eepass.cli import options
from eepass.cli.command import command, drafts_of, load_model
from eepass.cli.console import console, errors
from eepass.cli.signals import Stopped
from eepass.errors import InputError
from eepass.server.options import ServerOptions, read_options

DEFAULTS = {each.name: each.default for each in fields(ServerOptions)}


def option(name: str, text: str, panel: str | None = None) -> Any:
    """An option of the server: None unless given, for a file may say it too."""
    default = "none" if DEFAULTS[name] in (None, ()) else DEFAULTS[name]
    return typer.Option(help=f"{text}; {default} unless given.", rich_help_panel=panel)


def access(name: str, text: str) -> Any:
    return option(name, text, "Access")


def limit(name: str, text: str) -> Any:
    return option(name, text, "Limits")


@command
def serve(
    context: typer.Context,
    model: options.Model,
    host: Annotated[str | None, access("host", "Address to listen at")] = None,
    port: Annotated[int | None, access("port", "Port, 0 for a free one")] = None,
    api_key: Annotated[
        str | None, access("api_key", "Bearer token of clients, better as EEPASS_API_KEY")
    ] = None,
    allow_host: Annotated[
        list[str] | None, access("allow_host", "Another name in the Host header, * for any")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, access("allow_origin", "A web page that may ask, https://…, * for any")
    ] = None,
    name: Annotated[str | None, access("name", "Another id of the model for clients")] = None,
    cache_tokens: Annotated[
        int | None, limit("cache_tokens", "Tokens of all requests there is room for")
    ] = None,
    max_prompt_tokens: Annotated[
        int | None, limit("max_prompt_tokens", "Tokens of a prompt")
    ] = None,
    max_answer_tokens: Annotated[
        int | None, limit("max_answer_tokens", "Tokens of an answer")
    ] = None,
    max_waiting: Annotated[
        int | None, limit("max_waiting", "Requests whose answer has not begun")
    ] = None,
    at_once: Annotated[int | None, limit("at_once", "Requests decoded together")] = None,
    max_connections: Annotated[int | None, limit("max_connections", "Open connections")] = None,
    max_body_bytes: Annotated[int | None, limit("max_body_bytes", "Bytes of a body")] = None,
    timeout: Annotated[float | None, limit("timeout", "Seconds for a request")] = None,
    slow_timeout: Annotated[
        float | None, limit("slow_timeout", "Seconds to send a request, or to read on")
    ] = None,
    stop_timeout: Annotated[
        float | None, limit("stop_timeout", "Seconds for answers to end, once told to stop")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file of these options; those given here win.")
    ] = None,
    artifact: options.ArtifactDir = None,
    drafts_alone: options.DraftsAlone = False,
    quantize: options.Quantize = "keep",
    activations: options.Activations = "int8",
    dense: Annotated[bool | None, typer.Option("--dense", help="No drafts and no exits.")] = None,
    speculate: Annotated[
        str | None, option("speculate", "Who drafts: cascade, eagle, suffix, lens or off")
    ] = None,
    share_prefixes: Annotated[
        bool | None, typer.Option(help="Compute common beginnings of prompts once.")
    ] = None,
    remember: Annotated[
        bool | None,
        typer.Option(
            "--remember", help="Drafts may repeat earlier requests: where all are one user's."
        ),
    ] = None,
    warm_up: Annotated[
        bool | None, typer.Option(help="Compile before the first request, not at it.")
    ] = None,
    log_level: Annotated[
        str | None, typer.Option(help="debug, info (a line a request), warning or error.")
    ] = None,
    dtype: options.Dtype = None,
    threads: options.Threads = 0,
    trust_native: options.Trust = False,
    debug: options.Debug = False,
) -> None:
    """Serve MODEL by the OpenAI protocol to many clients at once."""
    try:
        from eepass.server.running import serve_with
    except ImportError as error:
        raise InputError(f"serving needs pip install 'eepass[serve]' ({error})") from error
    # a list that was not given is empty
    given = {name: context.params[name] for name in DEFAULTS}
    given = {name: value for name, value in given.items() if value not in (None, [], ())}
    from_file = {} if config is None else read_options(config)
    chosen = ServerOptions.of({"log_level": "info", **from_file, **given})
    loaded = load_model(model, dtype, threads, trust_native, quantize, activations)
    if artifact is not None:
        loaded = replace(loaded, artifact=artifact)
    if drafts_alone:
        loaded = replace(loaded, artifact=drafts_of(loaded.artifact))
    with console.status("transforming and compiling"):
        server = serve_with(loaded, chosen)
    console.print(f"{server.model.name} at {server.url}; Ctrl-C ends it", highlight=False)
    try:
        server.join()
    except Stopped:
        server.kill_server()
    except KeyboardInterrupt:
        errors.print("stopping: running answers may end; Ctrl-C again stops at once")
        server.kill_server()
        raise
