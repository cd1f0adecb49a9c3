"""Draft heads that travel: written for other servers, read from them, refused by name."""

import dataclasses
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from command_line import refused
from foreign_heads import (
    DRAFTED,
    HIDDEN,
    as_speculators,
    foreign_config,
    foreign_tensors,
    logits_of,
    write_head,
)
from models import VOCABULARY, eager_compile, random_artifact, tiny_model, tiny_tokenizer
from safetensors.torch import load_file
from word_model import save_word_model, write_prompts

import eepass
from eepass.checkpoints.artifact import Artifact, fingerprint, load_artifact
from eepass.checkpoints.draft_codes import rounded
from eepass.checkpoints.models import LoadedModel
from eepass.config import ExitConfig
from eepass.drafts.import_head import import_draft
from eepass.drafts.read_head import read_head
from eepass.drafts.target import target_of
from eepass.drafts.write_head import export_draft
from eepass.errors import InputError
from eepass.model import split_model, transform
from eepass.runtime.drafting.eagle_head import EagleHead
from eepass.segments import GraphToMake

PROMPT = [5, 9, 44, 7, 8]


@pytest.fixture(scope="module")
def model():
    made = tiny_model("llama").to(torch.bfloat16)
    generator = torch.Generator().manual_seed(3)
    made.model.norm.weight.data = (torch.rand(HIDDEN, generator=generator) + 0.5).bfloat16()
    return made


@pytest.fixture(scope="module")
def loaded(model):
    return LoadedModel("tiny", model, tiny_tokenizer(), None)


@pytest.fixture(scope="module")
def artifact(model):
    """With a draft head as training leaves one, and norms that tell the features apart."""
    made = random_artifact(model)
    generator = torch.Generator().manual_seed(4)
    tensors = dict(made.tensors)
    for name, tensor in made.tensors.items():
        if name.startswith("eagle.") and name.endswith("norm"):
            tensors[name] = (torch.rand(tensor.shape, generator=generator) + 0.5).bfloat16()
    tensors["eagle.hot.ids"] = tensors["hot.ids"][::2].clone()
    return dataclasses.replace(made, tensors=rounded(tensors))


@pytest.fixture(scope="module")
def splits(model):
    return split_model(model, 64, (1,))


@pytest.fixture(autouse=True)
def traced_once(model, splits, monkeypatch):
    monkeypatch.setattr(
        "eepass.drafts.write_head.split_model",
        lambda other, *sizes: splits if other is model else split_model(other, *sizes),
    )


@pytest.fixture(scope="module")
def target(model, splits):
    return target_of(model, splits[0][1])


KINDS = {
    "EAGLE-3": {},
    "with other norms": {"norm_before_residual": True, "norm_before_fc": True},
    "EAGLE-3.1": {"fc_norm": True, "norm_output": True, "head_dim": 32},
    "narrower": {"hidden_size": 32, "target_hidden_size": HIDDEN},
}


def compiled(graph, structure, examples, *, logits):
    return eager_compile(GraphToMake.made(graph), structure, examples)


def first_level(eagle, embedding, lm_head, tokens, features):
    """The likeliest tokens after ``tokens`` and their log-probabilities, as the engine has them."""
    tensors = dict(eagle)
    tensors.setdefault("eagle.hot.head", lm_head[tensors["eagle.hot.ids"].long()])
    head = EagleHead(tensors, embedding, compiled)
    (level,) = head.begin(tokens.tolist(), features, levels=1)
    return level


@pytest.mark.parametrize("form", ("flat", "speculators"))
@pytest.mark.parametrize("kind", KINDS)
def test_a_head_from_elsewhere_drafts_as_its_own_server_does(target, tmp_path, kind, form):
    config = foreign_config(**KINDS[kind])
    tensors = foreign_tensors(config)
    written = (config, tensors) if form == "flat" else as_speculators(config, tensors)
    eagle, _ = read_head(write_head(tmp_path, *written), target)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCABULARY, (8,), generator=generator)
    features = torch.randn(8, 4 * HIDDEN, generator=generator)
    embedding = target.embedding.float()
    level = first_level(eagle, embedding, target.lm_head.float(), tokens, features)
    logits = logits_of(tensors, config, embedding, tokens, features[:, HIDDEN:])
    best = logits.log_softmax(-1).topk(len(level.tokens))
    assert level.tokens == (best.indices + 1).tolist()
    torch.testing.assert_close(torch.tensor(level.scores), best.values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", ("eagle3", "speculators"))
def test_there_and_back_every_bit_is_the_same(loaded, artifact, target, tmp_path, form):
    found = export_draft(loaded, artifact, tmp_path / "head", form, "some/model")
    assert found["layers"] == [1, 2, 4]
    assert "some/model" in (tmp_path / "head" / "README.md").read_text()
    eagle, _ = read_head(tmp_path / "head", target)
    own = {n: t for n, t in artifact.tensors.items() if n.startswith("eagle.")}
    assert eagle.keys() == own.keys()
    for name, tensor in own.items():
        assert eagle[name].dtype == tensor.dtype and torch.equal(eagle[name], tensor), name


def test_a_trained_head_drafts_there_as_it_does_here(loaded, artifact, target, tmp_path):
    """What it reads there is the hidden state after the last layer, not normed."""
    export_draft(loaded, artifact, tmp_path / "head", "eagle3")
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    tensors = load_file(tmp_path / "head" / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCABULARY, (8,), generator=generator)
    one, two, last = torch.randn(3, 8, HIDDEN, generator=generator) * 3
    z = F.rms_norm(last, (HIDDEN,), target.final_norm.float(), 1e-6)
    here = {n: t.float() if t.is_floating_point() else t for n, t in artifact.tensors.items()}
    embedding, lm_head = target.embedding.float(), target.lm_head.float()
    level = first_level(here, embedding, lm_head, tokens, torch.cat([z, one, two], -1))
    there = logits_of(tensors, config, embedding, tokens, torch.cat([one, two, last], -1))
    best = there.log_softmax(-1).topk(len(level.tokens))
    hot = torch.arange(len(tensors["d2t"])) + tensors["d2t"]
    assert level.tokens == hot[best.indices].tolist()
    torch.testing.assert_close(torch.tensor(level.scores), best.values, atol=1e-4, rtol=1e-4)
    assert torch.equal(tensors["t2d"].nonzero()[:, 0], hot)
    assert config["sliding_window"] == 512 and config["intermediate_size"] == 192


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_from_elsewhere_is_written_as_it_was_read(loaded, target, tmp_path, kind):
    config = foreign_config(**KINDS[kind])
    tensors = foreign_tensors(config)
    eagle, _ = read_head(write_head(tmp_path / "foreign", config, tensors), target)
    Artifact(fingerprint(loaded.model), {}, eagle).save(tmp_path / "artifact")
    kept = load_artifact(tmp_path / "artifact")
    export_draft(loaded, kept, tmp_path / "again", "eagle3")
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name].to(tensor.dtype), tensor), name
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    for name, value in {**config, **KINDS[kind]}.items():
        if name not in ("eagle_config", "architectures"):
            assert written[name] == value, name


class EagerCompiler:
    """In place of inductor: what is looked at here is not its code."""

    kernels_missing = "not used"

    def __call__(self, graph, structure, examples, *, logits=False):
        return eager_compile(GraphToMake.made(graph), structure, examples)


def test_an_imported_head_drafts_for_the_engine(tmp_path, monkeypatch):
    """Measured, saved, loaded, and the answer with its drafts is the dense one."""
    for module in ("eepass.training.dense_model", "eepass.codegen.lower_cpu"):
        monkeypatch.setattr(f"{module}.CpuCompiler", EagerCompiler)
    folder = save_word_model(tmp_path / "model", artifact=True)
    loaded = eepass.load(str(folder), "fp32")
    config = foreign_config()
    write_head(tmp_path / "head", config, foreign_tensors(config))
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    made = import_draft(
        loaded, tmp_path / "head", tmp_path / "out", folder / "eepass", prompts=prompts, tokens=200
    )
    hits = made.report["draft_head"]["hits"]
    assert len(hits) == 4 and made.report["draft_head"]["measured_on"] >= 200
    assert made.report["by_kind"]["kinds"]
    # the exits that drafted with the other head are gone
    assert list(made.presets) == ["default"] and "predictor.paper.1.w1" not in made.tensors
    again = load_artifact(tmp_path / "out")
    assert again.presets.keys() == made.presets.keys()
    alone = dataclasses.replace(
        again, presets={}, tensors={n: t for n, t in again.tensors.items() if "eagle." in n}
    )
    drafts = ExitConfig(exits=False, speculate="eagle", adaptive=False)
    ready = transform(loaded.model, alone, drafts)
    dense = [step.token for step in ready.dense.generate(PROMPT, 24)]
    assert [step.token for step in ready.engine.generate(PROMPT, 24)] == dense
    assert ready.engine.draft.head.head.feature_layers == (1, 2, 3)
    assert not ready.has_exits and ready.plan is None
    with pytest.raises(InputError, match="early exit needs an artefact with exits"):
        ready.configure(ExitConfig().approximate())
    # other layers give other drafts
    with pytest.raises(InputError, match="not rising from 1 to 4"):
        import_draft(loaded, tmp_path / "head", layers=(2, 1, 3))


def test_scaled_positions_are_written_as_they_were_read(loaded, target, tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    config = foreign_config(rope_parameters=rope)
    eagle, read = read_head(write_head(tmp_path, config, foreign_tensors(config)), target)
    plain, _ = read_head(write_head(tmp_path, foreign_config(), foreign_tensors(config)), target)
    assert not torch.equal(eagle["eagle.rotary"], plain["eagle.rotary"])
    report = {"draft_head": {"config": dataclasses.asdict(read)}}
    made = Artifact(fingerprint(loaded.model), {}, eagle, report)
    export_draft(loaded, made, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_parameters"] == rope
    # without the report there is no telling
    with pytest.raises(InputError, match="of no base near"):
        export_draft(loaded, dataclasses.replace(made, report={"draft_head": 1}), tmp_path / "out")


@pytest.mark.slow
def test_a_head_alone_is_compiled_into_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    torch.use_deterministic_algorithms(False)
    loaded = eepass.load(str(save_word_model(tmp_path / "model", artifact=False)), "fp32")
    split = split_model(loaded.model, 64, (1,))[0][1]
    config = foreign_config()
    head = write_head(tmp_path / "head", config, foreign_tensors(config))
    eagle, _ = read_head(head, target_of(loaded.model, split))
    alone = Artifact(fingerprint(loaded.model), {}, eagle)
    with torch.no_grad():
        report = eepass.write_folder(loaded, tmp_path / "out", alone, rows=(1, 4), max_length=64)
    assert "none: without an artefact that has exits" in report["exit_graph"]
    ready = eepass.load(str(tmp_path / "out")).model
    ready.configure(ExitConfig(exits=False, speculate="eagle", adaptive=False))
    dense = [step.token for step in ready.dense.generate(PROMPT, 16)]
    assert [step.token for step in ready.engine.generate(PROMPT, 16)] == dense


WRONG = {
    "num_hidden_layers": ({"num_hidden_layers": 2}, "num_hidden_layers is 2: heads with 1"),
    "kind": ({"speculators_model_type": "peagle"}, "is 'peagle': eagle3 heads are read"),
    "model type": ({"model_type": "qwen3"}, "model_type is 'qwen3'"),
    "bias": ({"attention_bias": True}, "attention_bias is True"),
    "vocabulary": ({"vocab_size": 161}, "vocab_size is 161, and the model's is 160"),
    "hidden": ({"target_hidden_size": 32}, "target_hidden_size is 32, and the model's is 64"),
    "layers": (
        {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 3]}},
        r"\[0, 2, 3\], not rising from 1 to 4",
    ),
    "rope": ({"rope_scaling": {"type": "yarn"}}, "rope_type is 'yarn'"),
    "rope's numbers": ({"rope_scaling": {"rope_type": "llama3"}}, "llama3"),
    "window": ({"layer_types": ["sliding_attention"], "sliding_window": 64}, "sliding_window 64"),
    "size": ({"hidden_size": "64"}, "hidden_size is '64', not a size"),
    "inner": ({"intermediate_size": 50}, r"gate_proj.weight is float16 \[48, 64\]"),
    "drafted": ({"draft_vocab_size": 90}, r"d2t is int64 \[96\]"),
    "both norms": ({"norm_before_fc": True, "fc_norm": True}, "heads with one of them"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_head_cannot_be_is_named(target, tmp_path, name):
    changes, reason = WRONG[name]
    config = foreign_config(**changes)
    right = foreign_config(norm_before_fc=name == "both norms", fc_norm=name == "both norms")
    write_head(tmp_path, config, foreign_tensors(right))
    with pytest.raises(InputError, match=reason):
        read_head(tmp_path, target)


def test_damaged_heads_are_named(loaded, target, tmp_path):
    config = foreign_config()
    tensors = foreign_tensors(config)
    for change, reason in (
        ({"d2t": torch.full((DRAFTED,), 160)}, "d2t leads to tokens outside 0 to 159"),
        ({"d2t": torch.full((DRAFTED,), 2)}, "t2d and d2t name other tokens"),
        ({"mask_hidden": torch.zeros(1, 192)}, "mask_hidden is no tensor of a head"),
        ({"norm.weight": None}, "norm.weight is not in the checkpoint"),
    ):
        changed = {n: t for n, t in {**tensors, **change}.items() if t is not None}
        with pytest.raises(InputError, match=reason):
            read_head(write_head(tmp_path / "head", config, changed), target)
    (tmp_path / "head" / "model.safetensors").write_bytes(b"{}")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        read_head(tmp_path / "head", target)
    (tmp_path / "head" / "model.safetensors").unlink()
    (tmp_path / "head" / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(InputError, match="its weights are a pickle"):
        read_head(tmp_path / "head", target)
    (tmp_path / "head" / "config.json").write_text("[]")
    with pytest.raises(InputError, match="no JSON object"):
        read_head(tmp_path / "head", target)
    write_head(tmp_path / "head", config, {**tensors, "norm.weight": tensors["norm.weight"] / 0})
    with pytest.raises(InputError, match="not finite"):
        import_draft(loaded, tmp_path / "head")


def test_what_cannot_be_exported_is_named(loaded, artifact, tmp_path):
    with pytest.raises(InputError, match=r"fc_norm and norm_output, and llama\.cpp's graph"):
        export_draft(loaded, artifact, tmp_path / "out", "gguf")
    with pytest.raises(InputError, match="format 'onnx': expected eagle3"):
        export_draft(loaded, artifact, tmp_path / "out", "onnx")
    with pytest.raises(InputError, match=r"give --verifier: the folder or id of a/b\.gguf"):
        export_draft(dataclasses.replace(loaded, name="a/b.gguf"), artifact, tmp_path / "out")
    headless = {n: t for n, t in artifact.tensors.items() if not n.startswith("eagle.")}
    with pytest.raises(InputError, match="has no draft head"):
        export_draft(loaded, dataclasses.replace(artifact, tensors=headless), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="something else is there"):
        export_draft(loaded, artifact, tmp_path / "mine")
    export_draft(loaded, artifact, tmp_path / "out")
    # one that was exported is replaced
    export_draft(loaded, artifact, tmp_path / "out", "speculators", "some/model")
    assert "transformer_layer_config" in (tmp_path / "out" / "config.json").read_text()


def test_a_norm_that_is_no_weight_is_refused(tmp_path):
    """gpt2's final norm has a mean and a bias, gemma's adds one to its weight."""
    for family in ("gpt2", "gemma3"):
        model = tiny_model(family)
        artifact = random_artifact(model)
        loaded = LoadedModel(family, model, tiny_tokenizer(), None)
        with pytest.raises(InputError, match="its final norm is no RMS norm"):
            export_draft(loaded, artifact, tmp_path / family)


def test_the_commands(tmp_path):
    folder = save_word_model(tmp_path / "model")
    assert "llama.cpp's graph" in refused(
        "export-draft", folder, "--format", "gguf", "--out", tmp_path / "out"
    )
    text = refused("import-draft", folder, tmp_path / "none", "--out", tmp_path / "out")
    assert "no folder with a head" in text
    text = refused("import-draft", folder, tmp_path, "--out", tmp_path / "out", "--layers", "a")
    assert "--layers a" in text
