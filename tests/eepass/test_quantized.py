"""Quantised models: read, made, served exactly, left early, calibrated, written and refused."""

import dataclasses

import pytest
import torch
from caller import Seen, compiled, generate
from command_line import refused
from models import VOCABULARY, ForcedExits, random_artifact, tiny_model, tiny_tokenizer
from safetensors.torch import load_file

import eepass
from eepass.checkpoints.artifact import fingerprint
from eepass.checkpoints.quantized_weights import (
    QuantizedLinear,
    QuantizedWeight,
    quantized_layers,
)
from eepass.checkpoints.read_torchao import quantize, read_quantized
from eepass.config import ExitConfig
from eepass.errors import InputError
from eepass.model import transform
from eepass.ops.packed import ROW
from eepass.runtime.engine.engine import Engine
from eepass.runtime.engine.options import Options

ao = pytest.importorskip("torchao.quantization")
PROMPT = [5, 9, 44, 7, 8]


def words_tokenizer():
    """One whose fast form says all there is."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {**{f"w{n}": n for n in range(VOCABULARY - 1)}, "<unk>": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2", unk_token="<unk>")


def small():
    return tiny_model("llama", intermediate_size=128).bfloat16()


CONFIGS = {
    "int8": ao.Int8WeightOnlyConfig(),
    "int8 in groups": ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(32)),
    "int8, one scale": ao.Int8WeightOnlyConfig(granularity=ao.PerTensor()),
    "int8-dynamic": ao.Int8DynamicActivationInt8WeightConfig(),
    "int4": ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(32)),
    "int4 asymmetric": ao.IntxWeightOnlyConfig(
        torch.int4, ao.PerGroup(64), ao.quant_primitives.MappingType.ASYMMETRIC
    ),
    "int3": ao.IntxWeightOnlyConfig(torch.int3, ao.PerGroup(32)),
}


@pytest.mark.parametrize("form", CONFIGS)
def test_what_torchao_quantised_stands_for_the_same(form):
    model = small()
    ao.quantize_(model, CONFIGS[form])
    x = torch.randn(3, 64).bfloat16()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    wanted = {name: linear.weight.dequantize() for name, linear in linears.items()}
    said = linears["model.layers.1.mlp.up_proj"](x)
    assert read_quantized(model)
    layers = dict(quantized_layers(model))
    assert layers.keys() == linears.keys()
    for name, layer in layers.items():
        found = layer.quantized.values(torch.bfloat16)
        torch.testing.assert_close(found, wanted[name], rtol=2**-8, atol=1e-3)
    up = layers["model.layers.1.mlp.up_proj"]
    torch.testing.assert_close(up(x), said, rtol=3e-2, atol=3e-2)
    assert (up.activations == ROW) == (form == "int8-dynamic")


def test_int4_as_gpus_pack_it():
    """torchao packs it with a library for GPUs alone; a checkpoint can be read all the same."""
    codes = torch.randint(-8, 8, (6, 64)).to(torch.int8)
    scale, zero = torch.rand(2, 6).bfloat16(), torch.randn(2, 6).bfloat16()
    packed = (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)
    model = small()
    weight = ao.Int4Tensor(packed, scale, zero, [1, 32], torch.Size((6, 64)))
    model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
    assert read_quantized(model)
    expected = codes.float() * scale.t().float().repeat_interleave(32, 1)
    expected = expected + zero.t().float().repeat_interleave(32, 1)
    found = model.lm_head.quantized.values(torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module", params=("int8", "int4", "int8-dynamic"))
def checkpoint(request, tmp_path_factory):
    """A checkpoint as transformers writes one that it quantised through torchao."""
    from transformers import AutoModelForCausalLM, TorchAoConfig

    path = tmp_path_factory.mktemp("checkpoint")
    small().save_pretrained(path / "plain")
    config = TorchAoConfig(CONFIGS[request.param])
    model = AutoModelForCausalLM.from_pretrained(
        path / "plain", dtype=torch.bfloat16, quantization_config=config
    )
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path, model, request.param


def test_a_saved_checkpoint(checkpoint):
    path, original, form = checkpoint
    loaded = eepass.load(str(path))
    names = [name for name, _ in quantized_layers(loaded.model)]
    assert (
        len(names) == 4 * 7 and "int4" in loaded.quantization
        if form == "int4"
        else loaded.quantization
    )
    ids = torch.tensor([PROMPT])
    expected = original(ids).logits
    torch.testing.assert_close(loaded.model(ids).logits, expected, rtol=0.1, atol=0.1)
    # the head stays as it was: transformers leaves it alone
    assert isinstance(loaded.model.lm_head, torch.nn.Linear)
    with pytest.raises(InputError, match="quantised already"):
        eepass.load(str(path), quantize="int8")
    if form != "int8-dynamic":
        # the others are compiled by the tests below
        return
    model = transform(loaded.model, max_length=64)
    said = model.generate(PROMPT, 8)
    dense = [step.token for step in model.dense.generate(PROMPT, 8)]
    assert said[0, len(PROMPT) :].tolist() == dense


def _by_hand(model, ids, count):
    """Greedy answers of the quantised model token by token, by the operators' definitions."""
    answer = []
    for _ in range(count):
        logits = model(torch.tensor([[*ids, *answer]]), use_cache=False).logits
        answer.append(int(logits[0, -1].float().argmax()))
    return answer


@pytest.fixture(scope="module", params=("int8", "int4"))
def quantised(request):
    model = small()
    quantize(model, request.param)
    return transform(model, random_artifact(model), max_length=128), model


def test_exact_answers_are_the_quantised_models(quantised):
    model, original = quantised
    dense = [step.token for step in model.dense.generate(PROMPT, 24)]
    agreeing = sum(a == b for a, b in zip(dense, _by_hand(original, PROMPT, 24), strict=True))
    # until a near tie sends them different ways
    assert agreeing >= 3
    config = ExitConfig(adaptive=False, threshold=0.5)
    for speculate in ("cascade", "suffix", "off"):
        engine = model.configure(dataclasses.replace(config, speculate=speculate))
        assert [step.token for step in engine.generate(PROMPT, 24)] == dense, speculate
    statistics = model.configure(config).statistics
    assert statistics is not None


def test_exits_forced_at_each_boundary_leave_the_dense_cache(quantised):
    model, _ = quantised
    decoder = model.decoder
    for layer in range(1, 5):
        forced = ForcedExits(4, [layer] * 6, [9, 11, 13, 9, 21, 30])
        options = Options("approximate", "defer", 7, ("exits",))
        engine = Engine(decoder, forced, options=options)
        said = [step.token for step in engine.generate(PROMPT, 7)]
        assert said[1:] == [9, 11, 13, 9, 21, 30]
        ids = [*PROMPT, *said[:-1]]
        ours = [k[:, :, : len(ids)].clone() for k in (*decoder.kv.keys, *decoder.kv.values)]
        dense = Engine(decoder)
        sequence = dense.start(ids[:1])
        for token in ids[1:]:
            sequence.replace_last(token)
            dense.step()
        dense.reset()
        for own, cache in zip(ours, (*decoder.kv.keys, *decoder.kv.values), strict=True):
            assert torch.equal(own, cache[:, :, : len(ids)])


def test_hot_rows_and_drafts_read_the_quantised_head(quantised):
    model, original = quantised
    tensors = model.exit_parts(ExitConfig().approximate()).tensors
    hot = tensors["hot.ids"]
    layer = original.lm_head
    assert isinstance(layer, QuantizedLinear)
    chosen = QuantizedWeight(tensors["hot.head"], layer.form, len(hot))
    assert torch.equal(chosen.values(torch.float32), layer.quantized.values(torch.float32)[hot])
    z = torch.randn(1, 1, 64).bfloat16()
    exits = model.engine.exits
    assert exits is not None
    every = model.decoder.logits
    assert every is not None
    segments = model.segments_for(ExitConfig(), model.plan, {**model.decoder.tensors, **tensors}, 1)
    (logits,) = model.decoder.bind(segments.verify, tensors, [z])(z)
    whole = torch.ops.eepass.packed_logits(
        z[0], layer.packed, layer.form, layer.out_features, None, layer.activations
    )
    assert torch.equal(logits[0], whole[:, hot])


def test_weights_are_read_as_codes(quantised):
    model, _ = quantised
    from eepass.inspecting import describe

    read = describe(model)["weights"]
    codes = read.get("uint8", 0)
    assert codes > 3 * (sum(read.values()) - codes)


def test_quantising_what_is_not_known():
    with pytest.raises(InputError, match="int8, int4"):
        quantize(small(), "int5")
    with pytest.raises(InputError, match="keep, int8"):
        eepass.load("anything", quantize="fp8")
    model = small()
    ao.quantize_(model, ao.Float8WeightOnlyConfig())
    with pytest.raises(InputError, match="Float8Tensor"):
        read_quantized(model)
    model = small()
    asymmetric = ao.Int8DynamicActivationInt8WeightConfig(
        act_mapping_type=ao.quant_primitives.MappingType.ASYMMETRIC
    )
    ao.quantize_(model, asymmetric)
    with pytest.raises(InputError, match="symmetrically"):
        read_quantized(model)


def test_thresholds_found_anew(quantised, tmp_path):
    _, original = quantised
    from eepass.checkpoints.models import LoadedModel
    from eepass.training.recalibrate import calibrate

    other = random_artifact(tiny_model("llama", intermediate_size=128))
    tokenizer = tiny_tokenizer()
    loaded = LoadedModel("tiny", original, tokenizer, None)
    made = calibrate(loaded, other, tmp_path / "made", tokens=400, longest=40, raw=True)
    assert made.fingerprint == fingerprint(original)
    again = eepass.load_artifact(tmp_path / "made")
    for name, tensor in other.tensors.items():
        assert torch.equal(again.tensors[name], tensor)
    for part in again.presets.values():
        assert [c.target for c in part.calibrations] != [0.98]
    assert again.report["recalibrated"]["tokens"] >= 400
    deeper = random_artifact(tiny_model("llama", num_hidden_layers=2), k=8)
    with pytest.raises(InputError, match="layers"):
        calibrate(loaded, deeper)


def test_formats_of_other_libraries_are_refused_by_name(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    model.config.quantization_config = {"quant_method": "hqq", "quant_config": {}}
    model.config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"(?i)hqq"):
        eepass.load(str(tmp_path))


@pytest.mark.slow
def test_a_transformed_folder_holds_codes_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    torch.use_deterministic_algorithms(False)
    model = small()
    model.save_pretrained(tmp_path / "model")
    words_tokenizer().save_pretrained(tmp_path / "model")
    loaded = eepass.load(str(tmp_path / "model"), quantize="int4")
    artifact = random_artifact(loaded.model)
    original = transform(loaded.model, artifact, max_length=64)
    eepass.write_folder(loaded, tmp_path / "folder", artifact, rows=(1, 4), max_length=64)
    stored = load_file(tmp_path / "folder" / "model.safetensors")
    codes = [tensor for name, tensor in stored.items() if name.endswith(".packed")]
    assert len(codes) == 4 * 7 + 1 and all(tensor.dtype == torch.uint8 for tensor in codes)
    again = eepass.load(str(tmp_path / "folder"))
    for config in (None, ExitConfig(), ExitConfig().approximate()):
        engines = [m.dense if config is None else m.configure(config) for m in
                   (again.model, original)]  # fmt: skip
        said = [[step.token for step in engine.generate(PROMPT, 12)] for engine in engines]
        assert said[0] == said[1]


def test_through_the_backend(tmp_path):
    """A caller's compiled step over a quantised model: its eager answers, and exits."""
    torch._dynamo.reset()
    model = small().float()
    quantize(model, "int8")
    random_artifact(model, k=80).save(tmp_path / "a")
    ids = torch.tensor([PROMPT])
    expected = generate(model, model, ids, 8)
    assert generate(model, compiled(model, tmp_path / "a", threshold=1.0), ids, 8) == expected
    torch._dynamo.reset()
    seen = Seen()
    left = generate(model, compiled(model, tmp_path / "a", threshold=0.4, stats=seen), ids, 8)
    assert len(left[0]) == 8 and min(seen.layers) < 4


def test_what_the_command_line_refuses(tmp_path):
    small().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    said = refused("generate", tmp_path, "--prompt", "w5 ", "--raw", "--quantize", "int5")
    assert "keep, int8, int4" in said
    said = refused("calibrate", tmp_path, "--out", tmp_path / "a", "--quantize", "int8")
    assert "no artefact to calibrate" in said
    other = random_artifact(tiny_model("llama", num_hidden_layers=2), k=8)
    other.save(tmp_path / "other")
    command = ("calibrate", tmp_path, "--out", tmp_path / "a", "--artifact", tmp_path / "other")
    assert "layers is 2 there, 4 here" in refused(*command)
