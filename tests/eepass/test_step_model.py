"""``transform(..., launch=)``: the same tokens as the engine that goes layer by layer."""

import pytest
import torch
from models import eager_compile, random_artifact, tiny_model

import eepass
from eepass.config import ExitConfig
from eepass.errors import EngineError, InputError
from eepass.executors import CapturedSteps
from eepass.model import EarlyExitModel
from eepass.passes.pipeline import fused_exits, split_for_rows
from eepass.passes.report import PassReport
from eepass.runtime.engine.engine import Engine
from eepass.runtime.sampling import Sampling
from eepass.runtime.step.exit_points import ExitPoints
from eepass.runtime.step.launching import choose, make_engine

PROMPT = [5, 9, 44, 7, 8]
CPU = torch.device("cpu")
# exits of the random artefact are at random; so are the answers
CONFIGS = {
    "default": ExitConfig().approximate(),
    "eager to leave": ExitConfig(threshold=0.2).approximate(),
    "whole head": ExitConfig(verify="full", threshold=0.3).approximate(),
    "all predictors": ExitConfig(schedule=False).approximate(),
    "few wait": ExitConfig(pending=2, threshold=0.2).approximate(),
    "never": ExitConfig(threshold=1.0).approximate(),
    "propagate": ExitConfig(
        kv="propagate", guarantee="approximate", speculate="off", adaptive=False
    ),
    "drop": ExitConfig(kv="drop", guarantee="approximate", speculate="off", adaptive=False),
}


def said(model, count=40, prompt=PROMPT):
    return [tuple(step) for step in model.stream(prompt, count)]


@pytest.fixture(scope="module", params=("host", "interpret"))
def steps(request, transformed):
    """The compiled tiny llama, its decode steps captured."""
    return transformed.share(choose(request.param, CPU))


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_say_what_the_engine_says(transformed, steps, name):
    config = CONFIGS[name]
    with torch.no_grad():
        transformed.configure(config)
    steps.configure(config)
    for prompt in (PROMPT, [61, 12, 90]):
        expected = said(transformed, prompt=prompt)
        assert said(steps, prompt=prompt) == expected
    engine, ours = transformed.statistics, steps.statistics
    # the engine counts the token a prompt ends with, and no pass for it
    assert ours.tokens == engine.tokens == 78
    assert ours.exit_layers == engine.exit_layers
    names = ("predictors_run", "wanted", "refused", "full_heads", "rows_caught_up")
    for name_ in names:
        assert getattr(ours, name_) == getattr(engine, name_), name_
    if name == "never":
        assert ours.exit_layers[-1] == 78 and ours.predictors_run
    elif name == "eager to leave":
        assert ours.exit_layers[-1] < 70 and ours.wanted > ours.refused


def test_dense_steps_and_forced_exits(transformed, steps):
    with torch.no_grad():
        dense = [
            t for t, _ in ((s.token, s.exit_layer) for s in transformed.dense.generate(PROMPT, 20))
        ]
    steps.configure(dense=True)
    assert [token for token, _ in said(steps, 20)] == dense
    steps.configure(CONFIGS["default"])
    assert isinstance(steps.dense, CapturedSteps)
    assert [step.token for step in steps.dense.generate(PROMPT, 20)] == dense
    steps.configure(CONFIGS["drop"], force=2)
    assert [layer for _, layer in said(steps, 6)] == [4, 2, 2, 2, 2, 2]
    for layer in (0, 5):
        with pytest.raises(InputError, match="from 1 to 4"):
            steps.configure(CONFIGS["drop"], force=layer)
    for model, config in ((steps, ExitConfig()), (transformed, CONFIGS["drop"])):
        with pytest.raises(InputError, match="force=2: wants an approximate config"):
            model.configure(config, force=2)


def test_drawn_tokens_hang_on_the_seed_alone(steps):
    """With exits in the way; greedy again afterwards."""
    steps.configure(CONFIGS["eager to leave"])
    greedy = said(steps, 20)

    def drawn(**options):
        return [tuple(step) for step in steps.stream(PROMPT, 20, Sampling(**options))]

    one = drawn(temperature=1.0, top_p=0.9, seed=1)
    assert one == drawn(temperature=1.0, top_p=0.9, seed=1) != greedy
    assert one != drawn(temperature=1.0, top_p=0.9, seed=2)
    assert drawn(temperature=1.0, top_k=1, seed=3) == greedy == said(steps, 20)


def test_a_stream_that_waits_leaves_the_callers_modes_alone(steps):
    for config in (CONFIGS["default"], ExitConfig(speculate="off", adaptive=False)):
        steps.configure(config)
        with torch.enable_grad():
            stream = steps.stream(PROMPT, 5)
            next(stream)
            assert torch.is_grad_enabled() and not next(stream).token < 0
            assert torch.is_grad_enabled()
            stream.close()
            assert torch.is_grad_enabled()


def test_exact_answers_go_through_the_engine(transformed, steps):
    config = ExitConfig(speculate="off", adaptive=False)
    steps.configure(config)
    report = steps.launch_report
    assert report.mode == "engine" and "layer by layer" in report.reason
    with torch.no_grad():
        dense = [step.token for step in transformed.dense.generate(PROMPT, 20)]
    assert [token for token, _ in said(steps, 20)] == dense
    steps.configure(CONFIGS["default"])
    assert steps.launch_report.mode == steps.launching.mode


def test_the_report_says_how_and_what_it_costs(steps):
    steps.configure(CONFIGS["default"])
    list(steps.stream(PROMPT, 8))
    report = steps.launch_report
    assert report.mode == steps.launching.mode and report.reason
    assert report.rows == (1, 4, 8)
    assert 0 < report.bytes < 1e6
    assert report.host_synchronisations == 0
    assert "predict 2" in report.launches and "head" in report.launches


def test_a_model_is_transformed_for_steps(llama):
    """By ``launch=``: exact unless asked otherwise; dense by captured steps."""
    model = eepass.transform(llama, max_length=128, launch="host", stop=frozenset({64}))
    exact = model.generate([PROMPT], max_new_tokens=30)
    assert model.launch_report.mode == "engine"
    model.configure(dense=True)
    found = model.generate([PROMPT], max_new_tokens=30)
    assert model.launch_report.mode == "host"
    with torch.no_grad():
        expected = llama.generate(torch.tensor([PROMPT]), max_new_tokens=30, do_sample=False,
                                  eos_token_id=64)  # fmt: skip
    assert torch.equal(found, expected) and torch.equal(exact, expected)
    with pytest.raises(InputError, match="one prompt at a time, not 2"):
        model.generate([PROMPT, PROMPT])
    with pytest.raises(EngineError, match="no repetition_penalty"):
        model.generate(PROMPT, 4, Sampling(temperature=1.0, repetition_penalty=1.1))
    with pytest.raises(InputError, match="needs an artefact"):
        model.configure(ExitConfig().approximate())


@pytest.mark.parametrize(
    "options, error, said_",
    (
        ({"launch": "device"}, EngineError, "needs a CUDA device; on a CPU use host"),
        ({"launch": "quick"}, EngineError, "must be one of auto"),
        ({"device": "tpu"}, InputError, "device='tpu'"),
        ({"device": "xpu"}, EngineError, "must be cpu or cuda"),
        ({"launch": "host", "dump": "x"}, InputError, "dump and draft_model go with neither"),
    ),
)
def test_what_cannot_be_had_is_refused_before_anything_is_done(llama, options, error, said_):
    with pytest.raises(error, match=said_):
        eepass.transform(llama, **options)


def test_a_gpu_that_is_not_there_is_named(llama, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match=r"device='cuda': torch .*use device='cpu'"):
        eepass.transform(llama, device="cuda")


@pytest.mark.parametrize(
    "family",
    ("gemma3", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gpt2", "gpt_neox", "mixtral"))),
)
def test_steps_of_other_families(family):
    """Sliding windows, layer norms, learned positions: early exits as the engine's."""
    model = tiny_model(family)
    with torch.no_grad():
        splits, report = split_for_rows(model, 128, (1, 4, 8), 16)
        early = EarlyExitModel(
            splits, report, frozenset(), random_artifact(model), compiler=eager_compile
        )
        early.configure(CONFIGS["eager to leave"])
    steps = early.share(choose("interpret", CPU))
    steps.configure(CONFIGS["eager to leave"])
    expected = said(early, 30)
    assert said(steps, 30) == expected
    assert {layer for _, layer in expected} != {4}


class Counted:
    """A compiler that counts its calls and runs graphs as they were traced."""

    kernels_missing = ""

    def __init__(self):
        self.calls = 0

    def __call__(self, *args, **options):
        self.calls += 1
        return eager_compile(*args, **options)


@pytest.fixture
def compilers(monkeypatch):
    """Those made since; the models of a test compile through them."""
    made = []

    def new():
        made.append(Counted())
        return made[-1]

    monkeypatch.setattr("eepass.early_exit_model._cpu_compiler", new)
    return made


@pytest.mark.parametrize(
    "where",
    ({}, {"device": "cpu"}, {"launch": "host"}, {"launch": "interpret"}),
    ids=("plain", "device", "host", "interpret"),
)
def test_class_and_guarantee_are_the_same_everywhere(llama, compilers, where):
    """And building compiles nothing, nor do configurations: the first token does."""
    artifact = random_artifact(llama)
    del artifact.tensors["eagle.fc"]
    model = eepass.transform(llama, artifact, max_length=128, **where)
    assert type(model) is EarlyExitModel and model.config == ExitConfig()
    assert not compilers
    engine = model.configure(ExitConfig())
    assert isinstance(engine, Engine) and engine.options.guarantee == "exact"
    early = model.configure(CONFIGS["eager to leave"])
    assert isinstance(early, CapturedSteps if where else Engine)
    with pytest.raises(InputError, match="give transform a draft_model"):
        model.configure(ExitConfig(speculate="model"))
    with pytest.raises(InputError, match="has no draft head; run eepass train"):
        model.configure(ExitConfig(speculate="eagle", exits=False))
    # what was refused changed nothing
    assert model.engine is early and not compilers
    # what need not pay goes by captured steps, where there are any
    engine = model.configure(ExitConfig(adaptive=False))
    assert isinstance(engine, CapturedSteps if where else Engine)
    answer = [token for token, _ in said(model)]
    assert sum(compiler.calls for compiler in compilers) > 0
    assert model.statistics.rollbacks
    assert answer == [step.token for step in model.dense.generate(PROMPT, 40)]


def test_steps_are_captured_when_they_are_needed(llama, monkeypatch):
    captured = []
    monkeypatch.setattr(
        "eepass.executors.make_engine",
        lambda *args: captured.append(args) or make_engine(*args),
    )
    monkeypatch.setattr("eepass.early_exit_model._cpu_compiler", lambda: eager_compile)
    early = CONFIGS["eager to leave"]
    model = eepass.transform(llama, random_artifact(llama), early, 128, launch="host")
    model.configure(early)
    assert not captured
    first = said(model, 10)
    assert len(captured) == 1 and model.launch_report.mode == "host"
    list(model.stream(PROMPT, 4, Sampling(temperature=1.0, seed=1)))
    assert len(captured) == 2
    assert said(model, 10) == first and len(captured) == 2
    model.close()
    assert said(model, 10) == first and len(captured) == 3


CHAIN = ExitConfig(exits=False, speculate="suffix")


def test_drafts_from_the_text_are_verified_in_captured_steps(transformed, steps):
    """The exact engine's tokens, several a pass, greedily and sampled."""
    with torch.no_grad():
        transformed.configure(dense=True)
    steps.configure(CHAIN)
    assert isinstance(steps.engine, CapturedSteps)
    for prompt in (PROMPT, [61, 12, 90]):
        expected = [token for token, _ in said(transformed, prompt=prompt)]
        assert [token for token, _ in said(steps, prompt=prompt)] == expected
    found = steps.statistics
    assert found.tokens == 78 and found.passes < 78
    assert steps.launch_report.rows == (8,)
    assert steps.launch_report.launches[-1] == "accept"
    sampling = Sampling(temperature=0.8, seed=3)
    drawn = steps.generate(PROMPT, 30, sampling)
    assert torch.equal(drawn, steps.generate(PROMPT, 30, sampling))
    # the same token at each position as one row a pass draws
    steps.configure(dense=True)
    assert torch.equal(drawn, steps.generate(PROMPT, 30, sampling))


@pytest.mark.parametrize("source", ("cascade", pytest.param("eagle", marks=pytest.mark.slow)))
def test_drafts_of_a_trained_head_are_verified_in_captured_steps(transformed, steps, source):
    """Beside those from the text, or alone; its levels are part of the step."""
    with torch.no_grad():
        transformed.configure(dense=True)
    steps.configure(ExitConfig(exits=False, speculate=source))
    launches = steps.launch_report.launches
    assert "draft from head" in launches and launches[-1] == "compact"
    assert ("draft from text" in launches) == (source == "cascade")
    for prompt in (PROMPT, [61, 12, 90]):
        expected = [token for token, _ in said(transformed, prompt=prompt)]
        assert [token for token, _ in said(steps, prompt=prompt)] == expected


TREES = dict(adaptive=False, schedule=False, threshold=0.2)


@pytest.mark.parametrize("source", ("suffix", "cascade"))
def test_exits_in_captured_steps_that_verify_drafts(transformed, steps, source):
    """Exact answers are the dense ones; approximate ones those of one row a pass, where both exit:
    a token goes by the first exit point that takes it."""
    with torch.no_grad():
        transformed.configure(dense=True)
    steps.configure(ExitConfig(speculate=source, **TREES))
    assert isinstance(steps.engine, CapturedSteps)
    for prompt in (PROMPT, [61, 12, 90]):
        expected = [token for token, _ in said(transformed, 30, prompt)]
        assert [token for token, _ in said(steps, 30, prompt)] == expected
    assert steps.statistics.wanted > steps.statistics.refused
    launches = steps.launch_report.launches
    assert {"verify 2", "head", "settle"} < set(launches)
    assert ("draft from head" in launches) == (source == "cascade")
    steps.configure(ExitConfig(speculate=source, guarantee="approximate", **TREES))
    found = said(steps, 40)
    early = steps.statistics.exit_layers
    assert sum(early[:-1]) > 10 and steps.statistics.passes < 39
    steps.configure(ExitConfig(**TREES, pending=31).approximate())
    alone = steps.engine.follow(PROMPT, [token for token, _ in found])
    both = [(mine, one.token) for (mine, layer), one in zip(found[1:], alone, strict=True)
            if layer < 4 and one.exit_layer < 4]  # fmt: skip
    assert len(both) > 5 and all(mine == one for mine, one in both)


def test_exit_points_as_operators_take_the_rows_of_a_tree(llama, compilers):
    """What a GPU has kernels for, by its eager definition."""
    model = eepass.transform(llama, random_artifact(llama), max_length=128)
    model.configure(ExitConfig(speculate="suffix", **TREES))
    parts, decoder = model.exit_parts(model.config), model.decoder
    made = (decoder, parts.plan)
    with torch.no_grad():
        plain = ExitPoints(*made, parts.segments(8), parts.tensors, rows=8)
        tensors, report = {**decoder.tensors, **parts.tensors}, PassReport()
        fused = fused_exits(decoder.splits[1], parts.plan, tensors, report, 8)
        kernels = ExitPoints(*made, parts.segments(8), parts.tensors, fused, 8)
        assert not report.skipped and kernels.differ_from(plain) == ""


@pytest.mark.parametrize(
    "source, where, mode",
    (
        ("suffix", {"device": "cpu"}, "host"),
        ("cascade", {"launch": "interpret"}, "interpret"),
        ("eagle", {"launch": "host"}, "host"),
    ),
    ids=("suffix", "cascade", "eagle"),
)
def test_a_model_is_transformed_for_exact_steps(llama, compilers, source, where, mode):
    """Greedily the tokens of ``generate``, sampled those of one row a pass."""
    config = ExitConfig(exits=False, speculate=source)
    model = eepass.transform(llama, random_artifact(llama), config, 128, **where)
    answer = model.stream(PROMPT, 30)
    next(answer)
    # left half way, with a step in flight
    answer.close()
    for prompt in (PROMPT, [7, 8] * 20):
        with torch.no_grad():
            expected = llama.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)
        assert torch.equal(model.generate([prompt], max_new_tokens=30), expected)
    report = model.launch_report
    assert (report.mode, report.rows) == (mode, (8,)) and isinstance(model.engine, CapturedSteps)
    sampling = Sampling(temperature=0.8, seed=3)
    drawn = model.generate(PROMPT, 30, sampling)
    model.configure(dense=True)
    assert torch.equal(drawn, model.generate(PROMPT, 30, sampling))
    # early exits in between, and exactly again
    model.configure(CONFIGS["eager to leave"])
    said(model, 10)
    model.configure(config)
    assert torch.equal(model.generate([[7, 8] * 20], max_new_tokens=30), expected)


def test_without_an_artefact_the_default_goes_through_the_engine(transformed):
    """Which decides pass by pass what pays; captured steps verify drafts where they are to."""
    plain = transformed.share(choose("host", CPU))
    plain.artifact = None
    assert isinstance(plain.configure(ExitConfig()), Engine)
    assert isinstance(plain.configure(CHAIN), CapturedSteps)
    assert isinstance(plain.configure(CHAIN, dense=True), CapturedSteps)
    assert plain.launch_report.rows != (8,)
