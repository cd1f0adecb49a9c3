"""Code problems: what is read, what counts as solved, and what three ways of decoding solve."""

import json
from types import SimpleNamespace

import pytest
from command_line import refused, run
from word_model import save_word_model

from eepass.benchmark import sandbox, tasks
from eepass.benchmark.tasks import Problem, code_of, read_problems
from eepass.config import ExitConfig
from eepass.errors import InputError


def write_problems(file, *problems):
    file.write_text("".join(json.dumps(p) + "\n" for p in problems))
    return file


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("Here:\n```python\nx = 1\n```\nand\n```python\nx = 2\n```", "x = 1"),
        ("```\nx = 1\n```", "x = 1"),
        # cut off by the limit of tokens
        ("```py\nx = 1\ny = 2", "x = 1\ny = 2"),
        ("x = 1", "x = 1"),
    ],
)
def test_the_code_of_an_answer(answer, code):
    assert code_of(answer) == code


def test_problems_are_read(tmp_path):
    file = write_problems(
        tmp_path / "p.jsonl",
        {"prompt": "one", "tests": ["assert f(1)"], "task_id": 3},
        {"prompt": "two", "tests": ["assert g(1)", "assert g(2)"], "setup": "import math"},
    )
    one, two = read_problems(file)
    assert one == Problem("one", "", ("assert f(1)",))
    assert two == Problem("two", "import math", ("assert g(1)", "assert g(2)"))
    assert read_problems(file, 1) == [one]


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": "x"}, {"prompt": "x", "tests": []}, {"prompt": "x", "tests": "assert f()"},
        {"prompt": 3, "tests": ["assert f()"]}, {"prompt": "x", "tests": [None]}, [], None,
        {"prompt": "x", "tests": ["assert f()"], "setup": 4},
        {"prompt": "\ud800", "tests": ["assert f()"]},
    ],
)  # fmt: skip
def test_a_file_of_something_else_is_refused_by_its_line(tmp_path, bad):
    good = {"prompt": "x", "tests": ["assert f()"]}
    with pytest.raises(InputError, match=r"p\.jsonl, line 2: expected"):
        read_problems(write_problems(tmp_path / "p.jsonl", good, bad))


def test_bench_counts_what_is_solved(tmp_path, monkeypatch):
    folder = save_word_model(tmp_path / "model")
    problem = {"prompt": "w3 w4 w5", "tests": ["assert True"]}
    file = write_problems(tmp_path / "p.jsonl", problem, problem | {"prompt": "w9 w8"})
    seen = []

    def passes(code, tests):
        seen.append((code, tests))
        return len(seen) > 2

    monkeypatch.setattr(tasks, "passes", passes)
    arguments = ("bench", folder, "--task", "mbpp", file, "--dtype", "fp32", "--new-tokens", 6)
    code, _, text = run(*arguments, "--run-code", "--json", tmp_path / "a.json")
    assert code == 0, text
    found = json.loads((tmp_path / "a.json").read_text())
    assert (found["task"], found["problems"]) == ("mbpp", 2)
    assert found["systems"].keys() == {"dense", "exact", "approximate"}
    for name in ("dense", "exact"):
        # the first call asks whether code can be confined at all
        assert found["systems"][name] == {
            "pass_at_1": 0.5, "same_answer": 1.0, "solved": [False, True]
        }  # fmt: skip
    assert all(tests == ("assert True",) for _, tests in seen[1:])
    assert all(len(code.split()) == 6 for code, _ in seen[1:])


def test_an_answer_is_the_same_beside_others(transformed, monkeypatch):
    """More problems than go together are all answered, each with its own answer."""
    loaded = SimpleNamespace(
        encode=lambda text, raw: [ord(letter) % 60 for letter in text],
        tokenizer=SimpleNamespace(decode=lambda tokens, **_: " ".join(map(str, tokens))),
    )
    texts = ["one two", "three", "four five six", "seven", "eight nine", "ten"]
    problems = [Problem(text, "", ("assert True",)) for text in texts]
    # any predictor exits
    config = ExitConfig(threshold=0.0)
    found = []
    for together in (1, 4):
        answered = {}
        monkeypatch.setattr(
            tasks, "passes", lambda code, tests, to=answered: to.setdefault(code, True)
        )
        monkeypatch.setattr(tasks, "TOGETHER", together)
        result = tasks.measure_task(loaded, transformed, problems, 12, config)
        assert result["problems"] == len(problems)
        found.append((list(answered), result["systems"]))
    assert found[0] == found[1]
    assert found[0][1]["exact"]["same_answer"] == 1
    # tokens that exited: not all answers are the dense ones
    assert found[0][1]["approximate"]["same_answer"] < 1


def test_no_code_is_run_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "passes", None)
    file = write_problems(tmp_path / "p.jsonl", {"prompt": "w3", "tests": ["assert True"]})
    assert "--run-code" in refused("bench", "smollm2", "--task", "mbpp", file)
    assert "expected mbpp" in refused("bench", "smollm2", "--task", "other", file, "--run-code")
    assert "--run-code" in refused("bench", "smollm2", "--task", "mbpp", tmp_path / "none.jsonl")
