"""Other engines, where they are installed, answer from a checkpoint of the twin; here stand-ins."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "suite" / "other_engine.py"
STAND_INS = {
    "vllm": """
from types import SimpleNamespace
class SamplingParams:
    def __init__(self, temperature, max_tokens, ignore_eos, detokenize):
        assert temperature == 0 and ignore_eos
        self.count = max_tokens
class LLM:
    def __init__(self, model, **options): assert model == "there"
    def generate(self, prompts, sampling, use_tqdm):
        (prompt,) = prompts
        last = prompt["prompt_token_ids"][-1]
        said = SimpleNamespace(token_ids=[last + 1 + i for i in range(sampling.count)])
        return [SimpleNamespace(outputs=[said])]
""",
    "sglang": """
class Engine:
    def __init__(self, model_path, **options): assert model_path == "there"
    def generate(self, input_ids, sampling_params):
        assert sampling_params["temperature"] == 0 and sampling_params["ignore_eos"]
        count = sampling_params["max_new_tokens"]
        return {"output_ids": [input_ids[-1] + 1 + i for i in range(count)]}
""",
}


@pytest.mark.parametrize("module", STAND_INS)
def test_greedy_answers_and_times(module, tmp_path):
    (tmp_path / f"{module}.py").write_text(STAND_INS[module])
    order = {"module": module, "folder": "there", "prompts": [[3], [4, 9]], "tokens": 4,
             "length": 64}  # fmt: skip
    ran = subprocess.run(
        [sys.executable, str(PROGRAM)], input=json.dumps(order), capture_output=True, text=True,
        check=True, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    found = json.loads(ran.stdout)
    assert found["said"] == [[4, 5, 6, 7], [10, 11, 12, 13]] and len(found["ms_per_token"]) == 2
