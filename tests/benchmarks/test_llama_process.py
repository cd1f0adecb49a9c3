"""llama.cpp in a process of its own: what is asked of it, and what becomes of its failures."""

import json

import pytest

from benchmarks.llama_process import LlamaProcess
from eepass.errors import InputError

STAND_IN = """
import json, os
from pathlib import Path
from types import SimpleNamespace

LOG = Path(__file__).with_name("calls")
held = []

def note(**call):
    with LOG.open("a") as log:
        log.write(json.dumps(call) + "\\n")

def llama_log_callback(function): return function
def llama_log_set(callback, data): pass
def llama_backend_init(): os.write(1, b"noise from C\\n")
def llama_print_system_info(): return b"AVX9 = 1"
def llama_model_default_params(): return SimpleNamespace()
def llama_context_default_params(): return SimpleNamespace()

def llama_model_load_from_file(file, options):
    return None if b"broken" in file else "model"

def llama_init_from_model(model, options):
    note(threads=[options.n_threads, options.n_threads_batch], ubatch=options.n_ubatch)
    return "context"

def llama_get_memory(context): return "memory"

def llama_memory_clear(memory, data): held.clear()

def llama_memory_seq_rm(memory, sequence, first, last): del held[first:]

def llama_synchronize(context): print("noise from Python")

def llama_batch_init(count, embeddings, sequences):
    return SimpleNamespace(
        n_tokens=0, token=[0] * count, pos=[0] * count, n_seq_id=[0] * count,
        seq_id=[[9] for _ in range(count)], logits=[None] * count,
    )

def llama_decode(context, batch):
    n = batch.n_tokens
    if n == 5: return 1
    if n == 6: os._exit(3)
    assert batch.pos[:n] == list(range(len(held), len(held) + n))
    note(held=len(held), rows=n, logits=sum(batch.logits[:n]), last=bool(batch.logits[n - 1]))
    held.extend(batch.pos[:n])
    return 0
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "build" / "llama_cpp").mkdir(parents=True)
    (tmp_path / "build" / "llama_cpp" / "__init__.py").write_text(STAND_IN)
    return tmp_path / "build"


@pytest.fixture
def process(folder, tmp_path):
    process = LlamaProcess(tmp_path / "model.gguf", 2, 64, 8, folder)
    yield process
    process.close()


def test_passes_follow_a_fixed_text_and_prompts_begin_anew(process, folder):
    assert process.info == "AVX9 = 1"
    times = [*process.passes(4, 2), process.prefill(30), *process.passes(2, 1)]
    assert len(times) == 4 and all(seconds > 0 for seconds in times)
    first, *calls = map(json.loads, (folder / "llama_cpp" / "calls").read_text().splitlines())
    assert first == {"threads": [2, 2], "ubatch": 512}
    assert [(call["held"], call["rows"], call["logits"]) for call in calls] == [
        (0, 8, 1), (8, 4, 4), (8, 4, 4), (0, 30, 1), (0, 8, 1), (8, 2, 2),
    ]  # fmt: skip
    assert all(call["last"] for call in calls)


def test_a_pass_that_fails_is_an_error_and_the_next_is_not(process):
    with pytest.raises(InputError, match="llama_decode of 5 tokens returned 1"):
        process.passes(5, 1)
    assert len(process.passes(4, 1)) == 1
    with pytest.raises(InputError, match="65 tokens, and room for 64"):
        process.prefill(65)


def test_a_process_that_ends_is_an_error(process):
    with pytest.raises(InputError, match="ended with status 3"):
        process.passes(6, 1)
    with pytest.raises(InputError, match="ended with status 3"):
        process.passes(4, 1)


def test_what_cannot_be_loaded_is_named(folder, tmp_path):
    with pytest.raises(InputError, match=r"broken\.gguf: llama\.cpp cannot load it"):
        LlamaProcess(tmp_path / "broken.gguf", 2, 64, 8, folder)
    with pytest.raises(InputError, match="no llama_cpp in it"):
        LlamaProcess(tmp_path / "model.gguf", 2, 64, 8, tmp_path)
    (folder / "llama_cpp" / "__init__.py").write_text("import not_there_at_all")
    with pytest.raises(InputError, match=r"not installed.*not_there_at_all"):
        LlamaProcess(tmp_path / "model.gguf", 2, 64, 8, folder)
