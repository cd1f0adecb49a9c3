"""The second start of a model traces nothing and compiles nothing, and gives the same answer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kept_cache import keep_in
from models import random_artifact, tiny_model
from torch import nn

from eepass.kept.keys import Unforeseen, environment, model_key
from eepass.kept.splits import kept_entries
from eepass.model import transform

PROMPT = [5, 9, 40, 7]
START = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from models import random_artifact, tiny_model
from eepass.codegen import lower_cpu
from eepass.model import transform
from eepass.passes.trace import capture
counts = {"compiled": 0, "traced": 0}
def counted(module, name, what):
    original = getattr(module, name)
    def count(*arguments, **options):
        counts[what] += 1
        return original(*arguments, **options)
    setattr(module, name, count)
counted(lower_cpu, "through_inductor", "compiled")
counted(capture, "_dynamo_graph", "traced")
model = tiny_model("llama")
with torch.no_grad():
    made = transform(model, random_artifact(model), max_length=128)
    ids = made.generate([5, 9, 40, 7], 12)[0].tolist()
print(json.dumps({"ids": ids, **counts}))
"""


def start_process():
    command = [sys.executable, "-c", START, str(Path(__file__).parents[1])]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def outcome(process):
    text, _ = process.communicate()
    assert process.returncode == 0
    return json.loads(text.splitlines()[-1])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own, with the kernels that are built already."""
    return keep_in(tmp_path, monkeypatch)


def dense_answer(model, count):
    found = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=count, do_sample=False, eos_token_id=None
    )
    return found.tolist()


def test_two_first_starts_at_a_time_and_a_second_one(cache):
    first = [start_process(), start_process()]
    one, two = map(outcome, first)
    assert one["compiled"] and one["traced"] and one["ids"] == two["ids"]
    kinds = {path.name.partition("-")[0] for path in (cache / "kept").iterdir()}
    assert kinds == {"code", "costs", "exits", "splits"}
    assert outcome(start_process()) == {**one, "compiled": 0, "traced": 0}
    # damage is repaired, entry by entry
    for entry in (cache / "kept").iterdir():
        for file in entry.iterdir():
            file.write_bytes(file.read_bytes()[:-1])
    again = outcome(start_process())
    assert again["ids"] == one["ids"] and again["compiled"] and again["traced"]
    assert outcome(start_process()) == {**one, "compiled": 0, "traced": 0}


def test_no_weights_are_kept_and_other_weights_decode_as_themselves(cache, monkeypatch):
    for start in (1, 2):
        model = tiny_model("llama")
        if start == 2:
            for parameter in model.parameters():
                parameter.mul_(1.1)
            monkeypatch.setattr("eepass.passes.pipeline.split_for_rows", None)
        made = transform(model, random_artifact(model), max_length=128)
        assert made.splits[1].tensors["lm_head.weight"] is model.lm_head.weight
        assert made.generate(PROMPT, 8).tolist() == dense_answer(model, 8)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    graphs = [path for path in (cache / "kept").glob("splits-*/*") if "graphs" not in path.name]
    assert graphs and sum(path.stat().st_size for path in graphs) < weights / 10


CHANGES = {
    "a configured number": lambda m: setattr(m.config, "rms_norm_eps", 1e-3),
    "attention": lambda m: setattr(m.config, "_attn_implementation", "eager"),
    "an attribute": lambda m: setattr(m.model.layers[1].self_attn, "scaling", 0.5),
    "an activation": lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.GELU("tanh")),
    "a shape": lambda m: setattr(m, "lm_head", nn.Linear(64, 161, bias=False)),
    "a dtype": lambda m: m.lm_head.bfloat16(),
    "a tie": lambda m: setattr(m.lm_head, "weight", m.model.embed_tokens.weight),
    "a layer less": lambda m: m.model.layers.pop(3),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_key_changes_with(what):
    model = tiny_model("llama")
    before = model_key(model, 128)
    CHANGES[what](model)
    assert model_key(model, 128) != before


def test_a_key_changes_with_slots_rows_threads_and_versions(monkeypatch):
    model = tiny_model("llama")
    keys = [
        model_key(model, 128, (1, 4)),
        model_key(model, 192, (1, 4)),
        model_key(model, 128, (1, 8)),
    ]
    torch.set_num_threads(2)
    keys.append(model_key(model, 128, (1, 4)))
    torch.set_num_threads(1)
    for name, other in {"torch": "9.9", "transformers": "9.9"}.items():
        with monkeypatch.context() as patched:
            patched.setattr(f"{name}.__version__", other)
            from eepass.kept import keys as module

            module._installed.cache_clear()
            keys.append(model_key(model, 128, (1, 4)))
        module._installed.cache_clear()
    monkeypatch.setattr("eepass.kept.keys.cpu_flags", lambda: ["sse2"])
    module._installed.cache_clear()
    keys.append(model_key(model, 128, (1, 4)))
    module._installed.cache_clear()
    assert len(set(keys)) == len(keys)


def test_a_key_is_of_the_structure_not_the_values():
    one, two = tiny_model("llama"), tiny_model("llama")
    for parameter in two.parameters():
        parameter.add_(1.0)
    two.config._name_or_path = "elsewhere"
    assert model_key(one) == model_key(two) and environment() == environment()


@pytest.mark.parametrize("what", ["a hook", "a forward", "a tensor"])
def test_of_a_model_that_no_key_describes_nothing_is_kept(cache, what):
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    if what == "a hook":
        mlp.register_forward_hook(lambda module, inputs, output: output * 2)
    elif what == "a forward":
        mlp.forward = lambda x: x * 0.5
    else:
        mlp.scale = torch.ones(64)
    with pytest.raises(Unforeseen):
        model_key(model)
    made = transform(model, None, max_length=128)
    assert made.generate(PROMPT, 4).tolist() == dense_answer(model, 4)
    assert not list(kept_entries().folder.glob("splits-*"))


def test_doctor_clears_the_cache(cache, monkeypatch):
    from typer.testing import CliRunner

    from eepass.cli.main import app

    kept_entries().write("a", {"code": bytes(2_000_000)})
    outside = cache.parent / "outside"
    outside.mkdir()
    (outside / "file").write_text("stays")
    (cache / "link").symlink_to(outside)
    result = CliRunner().invoke(app, ["doctor", "--clear-cache"])
    assert result.exit_code == 0 and str(cache) in result.output
    freed = float(result.output.split(": ")[1].split()[0])
    assert freed > 2.0 and not list(cache.iterdir()) and (outside / "file").exists()
