"""``model.generate`` with the backend: streaming, stopping, sampling, padding, pipelines."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from caller import IDS, Seen
from models import VOCABULARY, random_artifact, tiny_model
from transformers import CompileConfig, PreTrainedTokenizerFast, TextIteratorStreamer, pipeline

from eepass.torch_compile.backend import specee

ROOT = Path(__file__).parents[3]
NEW = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("artefact") / "a"
    random_artifact(tiny_model("llama")).save(path)
    return path


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    plain = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    plain.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="w0", eos_token="w2", padding_side="left"
    )


def config_of(folder, threshold, **changes):
    options = {"artifact": str(folder), "inner_backend": "eager", "threshold": threshold}
    found = CompileConfig(backend=specee, mode=None, options=options, **changes)
    # transformers compiles on a CPU only when told so
    found._compile_all_devices = True
    return found


@pytest.fixture(scope="module")
def dense(folder):
    """Generate with a model that never exits early, and with the eager one beside it."""
    torch._dynamo.reset()
    given = {"cache_implementation": "static", "max_new_tokens": NEW, "eos_token_id": None}
    config = config_of(folder, 1.0, fullgraph=True, dynamic=False)
    model = tiny_model("llama")

    def ask(tokens, **kwargs):
        torch.manual_seed(0)
        return model.generate(tokens, compile_config=config, **{**given, **kwargs})

    eager = tiny_model("llama")

    def expect(tokens, **kwargs):
        torch.manual_seed(0)
        return eager.generate(tokens, **{**given, **kwargs})

    return ask, expect


@pytest.mark.parametrize(
    "kwargs",
    (
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
        {"do_sample": False, "bad_words_ids": [[65]], "repetition_penalty": 1.3},
    ),
    ids=("greedy", "sampling", "logits processors"),
)
def test_without_exits_it_gives_the_models_tokens(dense, kwargs):
    ask, expect = dense
    assert torch.equal(ask(IDS, **kwargs), expect(IDS, **kwargs))


def test_left_padded_batches(dense):
    ask, expect = dense
    ids = torch.tensor([[0, 0, 0, 5, 9, 11], [17, 3, 60, 61, 62, 63]])
    mask = (ids != 0).long()
    given = {"attention_mask": mask, "do_sample": False}
    assert torch.equal(ask(ids, **given), expect(ids, **given))


def test_sliding_windows_before_and_after_they_are_full(tmp_path):
    torch._dynamo.reset()
    model, seen = tiny_model("gemma3"), Seen()
    random_artifact(model).save(tmp_path / "a")
    config = config_of(tmp_path / "a", 1.0)
    # transformers copies options, objects included, but not functions
    config.options["stats"] = lambda statistics: seen(statistics)
    given = {
        "cache_implementation": "static", "max_new_tokens": 6, "eos_token_id": None,
        "do_sample": False,
    }  # fmt: skip
    found = model.generate(IDS, compile_config=config, **given)
    assert torch.equal(found, tiny_model("gemma3").generate(IDS, **given))
    assert len(seen.layers) == 5, "a step went another way"


@pytest.fixture(scope="module")
def leaving(folder):
    """A model that exits early, and the arguments for ``generate``."""
    torch._dynamo.reset()
    seen = Seen()
    config = config_of(folder, 0.4)
    # transformers copies options, objects included, but not functions
    config.options["stats"] = lambda statistics: seen(statistics)
    given = {
        "cache_implementation": "static", "compile_config": config, "max_new_tokens": NEW,
        "do_sample": False, "eos_token_id": None,
    }  # fmt: skip
    return tiny_model("llama"), given, seen


def test_streams_stops_and_pipelines_with_exits(leaving, tokenizer):
    model, given, seen = leaving
    plain = model.generate(IDS, **given)
    assert min(seen.layers) < 4
    assert not torch.equal(
        plain, tiny_model("llama").generate(IDS, **{**given, "compile_config": None})
    )

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = threading.Thread(
        target=model.generate, args=(IDS,), kwargs={**given, "streamer": streamer}
    )
    thread.start()
    assert "".join(streamer).split() == tokenizer.decode(plain[0, 6:]).split()
    thread.join()

    third = int(plain[0, 8])
    first = plain[0].tolist().index(third, 6)
    stopped = model.generate(IDS, **{**given, "eos_token_id": third, "pad_token_id": 0})
    assert stopped[0].tolist() == plain[0, : first + 1].tolist()

    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (made,) = pipe("w5 w9 w11 w30 w7 w8", return_full_text=False, **given)
    expected = tokenizer.decode(plain[0, 6:], skip_special_tokens=True)
    assert made["generated_text"].split() == expected.split()


def test_sampling_with_exits_repeats_with_the_same_seed(leaving):
    model, given, _ = leaving
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.generate(IDS, **{**given, "do_sample": True, "temperature": 2.0}))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_the_backend_is_there_without_importing_eepass(tmp_path):
    """By its entry point, as an installed package has it."""
    info = tmp_path / "eepass-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: eepass\nVersion: 0\n")
    text = (ROOT / "pyproject.toml").read_text()
    section = text.split('[project.entry-points."torch_dynamo_backends"]')[1].split("[")[0]
    name, target = section.strip().split(" = ")
    (info / "entry_points.txt").write_text(
        f"[torch_dynamo_backends]\n{name} = {target.strip(chr(34))}\n"
    )
    code = (
        "import sys, torch\n"
        "assert 'eepass' not in sys.modules\n"
        "step = torch.compile(lambda x: x.sin() + 1, backend='specee', "
        "options={'inner_backend': 'eager'})\n"
        "print(step(torch.zeros(2)).tolist(), 'eepass' in sys.modules)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.stdout.split("\n")[0] == "[1.0, 1.0] True", found.stderr
