"""A folder's weights are all there and all used, or it is refused by name before it is built."""

import builtins
import json
import resource

import pytest
import torch
from foreign_checkpoints import change_config, write
from models import tiny_model, tiny_tokenizer
from safetensors.torch import load_file

import eepass
from eepass.checkpoints.holdings import Holdings, holdings_of
from eepass.errors import InputError


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def stored(folder):
    return load_file(folder / "model.safetensors")


UP = "model.layers.1.mlp.up_proj.weight"


def test_a_missing_tensor_is_named(folder):
    write(folder, {name: tensor for name, tensor in stored(folder).items() if name != UP})
    with pytest.raises(InputError, match=f"it has no {UP}"):
        eepass.load(str(folder))


def test_a_tensor_the_model_has_no_place_for_is_named(folder):
    write(folder, stored(folder) | {"model.layers.1.mlp.gate.weight": torch.zeros(3)})
    with pytest.raises(InputError, match=r"no place for model\.layers\.1\.mlp\.gate\.weight"):
        eepass.load(str(folder))


def test_a_renamed_tensor_is_named(folder):
    write(folder, {name.replace("up_proj", "upp_proj"): t for name, t in stored(folder).items()})
    with pytest.raises(InputError, match=r"it has no model.*up_proj.weight \(and 3 more\)"):
        eepass.load(str(folder))


def test_a_tensor_of_another_shape_is_named(folder):
    write(folder, stored(folder) | {UP: torch.zeros(95, 64)})
    with pytest.raises(InputError, match=f"{UP} is 95 x 64, and the configuration wants 96 x 64"):
        eepass.load(str(folder))


def test_whole_numbers_that_nothing_explains(folder):
    write(folder, stored(folder) | {UP: torch.ones(96, 64, dtype=torch.int8)})
    with pytest.raises(InputError, match=f"{UP} holds whole numbers"):
        eepass.load(str(folder))


def test_tied_weights_need_not_be_there_twice(tmp_path):
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "lm_head.weight" not in stored(tmp_path)
    model = eepass.load(str(tmp_path)).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_models_compute_now_may_be_there(folder):
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    write(folder, stored(folder) | old)
    eepass.load(str(folder))


@pytest.mark.parametrize("shards", (1, 3))
def test_what_files_hold(folder, shards):
    tensors = stored(folder)
    write(folder, tensors, shards)
    values = sum(tensor.numel() for tensor in tensors.values())
    assert holdings_of(str(folder), False) == Holdings(str(folder), len(tensors), values)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, and its files hold 39"),
        ({"intermediate_size": 10**9}, "asks for more than the"),
        ({"vocab_size": 10**9}, "asks for more than the"),
        ({"head_dim": 10**9}, "asks for more than the"),
        ({"num_hidden_layers": 8}, r"it has no model\.layers\.4\."),
    ],
)
def test_more_than_the_files_hold_is_refused_unbuilt(folder, changes, said):
    change_config(folder, **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=said):
        eepass.load(str(folder))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def test_a_config_without_weights(tmp_path):
    tiny_model("llama").config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no weights there"):
        eepass.load(str(tmp_path))


def test_code_of_a_checkpoint_is_neither_run_nor_offered(folder, monkeypatch):
    def ask(*_):
        raise AssertionError("asked")

    monkeypatch.setattr(builtins, "input", ask)
    (folder / "own.py").write_text("raise SystemExit('it ran')\n")
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    change_config(folder, model_type="its-own", auto_map=names)
    with pytest.raises(InputError, match="brings Python code of its own, which eepass does not"):
        eepass.load(str(folder))
    change_config(folder, model_type="llama", auto_map={})
    settings = folder / "tokenizer_config.json"
    changed = {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}, "tokenizer_class": "Own"}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | changed))
    with pytest.raises(InputError, match="brings Python code of its own, which eepass does not"):
        eepass.load(str(folder))


def test_a_config_that_is_nested_without_end(folder):
    (folder / "config.json").write_text('{"a": ' * 100_000)
    with pytest.raises(InputError, match="nested too deeply"):
        eepass.load(str(folder))
