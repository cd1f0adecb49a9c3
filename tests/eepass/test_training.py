"""Training: input files, the losses on problems with known answers, thresholds, resuming."""

import json

import pytest
import torch
from models import VOCABULARY, tiny_model

import eepass
from eepass.config import ExitConfig
from eepass.errors import InputError
from eepass.ops import exits as exit_ops
from eepass.runtime.drafting.suffix import SuffixDraft
from eepass.training.calibration import NEVER, Costs, agreement_bound, calibrate, replay
from eepass.training.corpus import (
    GIVEN,
    Example,
    Prompt,
    mixed,
    read_answers,
    read_kinds,
    read_prompts,
    split_of,
)
from eepass.training.dense_model import best_token
from eepass.training.exits import ExitData, fit_predictors, fit_translator, score_exits
from eepass.training.hidden_states import HiddenStateStore
from eepass.training.train import _refuse_too_few, train
from eepass.training.trainer import Trainer

COSTS = Costs(num_layers=10, head=2.0, draft=0.3, predictor=0.05, verify=0.5)


class Watch:
    """A progress that can stop the run, as Ctrl-C would."""

    def __init__(self, stop_after=None):
        self.stages, self.stop_after = [], stop_after

    def begin(self, stage, total):
        self.stages.append(stage)

    def advance(self, amount):
        if self.stop_after and self.stages[-1] == self.stop_after:
            raise KeyboardInterrupt

    def say(self, text):
        pass


def given(*prompts):
    return [Prompt(ids, GIVEN, split_of(ids)) for ids in prompts]


@pytest.fixture
def examples():
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(40):
        prompt = torch.randint(3, VOCABULARY, (6,), generator=generator).tolist()
        answer = torch.randint(3, VOCABULARY, (12,), generator=generator).tolist()
        made.append(Example(prompt, answer, ("fit", "predict", "calibrate", "fit")[index % 4]))
    return made


def test_a_broken_line_is_named(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n\n{"turns": ["b", "c"]}\n')
    assert read_prompts(file) == ["a", "b"]
    file.write_text('{"prompt": "a", "kind": "code"}\n{"prompt": "b"}\n')
    assert read_kinds(file) == [("a", "code"), ("b", GIVEN)]
    file.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(InputError, match="line 2"):
        read_prompts(file)
    file.write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(InputError, match="line 2"):
        read_prompts(file)
    file.write_text('{"prompt": " "}\n')
    with pytest.raises(InputError, match="line 1: the prompt is empty"):
        read_prompts(file)
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"prompt": 0, "answer": [1, 999]}\n')
    with pytest.raises(InputError, match="line 1"):
        read_answers(answers, given([1]), 100)


def test_lines_end_at_newlines_alone(tmp_path):
    """Other separators and a byte-order mark are legal in JSON Lines."""
    file = tmp_path / "prompts.jsonl"
    texts = ["one\u2028two", "three\x85four", "five\u2029six"]
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    file.write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    assert read_prompts(file) == texts
    answers = tmp_path / "answers.jsonl"
    answers.write_bytes('\ufeff{"prompt": 1, "answer": [5], "of": "a\u2028b"}\n\n'.encode())
    assert read_answers(answers, given([1], [2]), 100)[0][:2] == ([2], [5])


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": -1, "answer": [1]}', '{"prompt": true, "answer": [1]}',
        '{"prompt": 2, "answer": [1]}', '{"prompt": "0", "answer": [1]}',
        '{"prompt": 0, "answer": [1.5]}', '{"prompt": 0, "answer": [true]}',
        '{"prompt": 0, "answer": "123"}', '{"prompt": 0, "answer": [-1]}',
        '{"prompt": 0, "answer": []}', '{"prompt": 0}', "[0, [1]]", "null", "[" * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_answer_is_named(tmp_path, line):
    file = tmp_path / "answers.jsonl"
    file.write_text('{"prompt": 0, "answer": [1]}\n' + line + "\n")
    with pytest.raises(InputError, match="line 2"):
        read_answers(file, given([1], [2]), 100)


@pytest.mark.parametrize(
    "line",
    [
        '{"turns": "text"}', '{"turns": []}', '{"turns": [3]}', '{"prompt": 3}', '{"prompt": null}',
        '["prompt"]', '"prompt"', '{"prompt": "a", "kind": 3}',
        '{"prompt": "\\ud800"}', '{"a": ' * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_prompt_is_named(tmp_path, line):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(InputError, match="line 2"):
        read_prompts(file)


def test_prompts_that_are_not_utf8_are_named(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(InputError, match="cannot be read as text"):
        read_prompts(file)
    with pytest.raises(InputError, match="cannot be read as text"):
        read_answers(file, given([1]), 100)


def test_every_stretch_of_prompts_has_all_splits():
    """A token limit ends early; what was answered until then has to train on all three."""
    prompts = given(*([n, n + 1] for n in range(1000)))
    ordered = mixed(prompts)
    assert sorted(ordered) == prompts
    for begin in range(0, 960, 32):
        stretch = ordered[begin : begin + 32]
        assert {prompt.split for prompt in stretch} == {"fit", "predict", "calibrate"}


def test_too_few_answers_say_what_to_give():
    fit = next([n] for n in range(100) if split_of([n]) == "fit")
    examples = [Example(fit, [5] * 1500, "fit")]
    with pytest.raises(InputError, match="1 answers of 1500 tokens are too few: give more prompts"):
        _refuse_too_few(examples, given(fit), 1000)
    with pytest.raises(InputError, match="raise --tokens above 1500"):
        _refuse_too_few(examples, given(fit, [101]), 1000)


def test_splits_go_by_prompt_and_have_their_sizes():
    splits = [split_of([n, n + 1]) for n in range(2000)]
    assert 0.76 < splits.count("fit") / 2000 < 0.84
    assert splits.count("calibrate") > 80
    assert split_of([7, 8]) == splits[7]


def test_a_translator_learns_a_rotation():
    torch.manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(3000, 16), dim=-1) * 4
    turn = torch.linalg.qr(torch.randn(16, 16)).Q
    hot = torch.randn(40, 16)
    fitted = fit_translator(z @ turn, z, lambda x: x, hot, lambda n: None, rank=16, passes=40)
    moved = exit_ops.translate(z @ turn, *fitted.values())
    agrees = ((moved @ hot.T).argmax(-1) == (z @ hot.T).argmax(-1)).float().mean()
    before = (((z @ turn) @ hot.T).argmax(-1) == (z @ hot.T).argmax(-1)).float().mean()
    assert before < 0.1 and agrees > 0.3


def made_data(count=4000):
    """Exits of which the draft's first logit says whether they are right."""
    torch.manual_seed(0)
    right = torch.stack([torch.rand(count) < layer / 10 for layer in (4, 6, 8)])
    logits = [
        torch.randn(count, 4) + 3 * here[:, None] * torch.tensor([1.0, 0, 0, 0]) for here in right
    ]
    # texts of ten tokens, of five kinds in turns
    text = torch.arange(count) // 10
    return ExitData((4, 6, 8), logits, torch.ones_like(right), right, text, text // 2 % 5)


def test_predictors_tell_right_exits_from_wrong_ones():
    data = made_data()
    fitted = fit_predictors(data, lambda n: None)
    for row, right in zip(score_exits(data, fitted).probability, data.right, strict=True):
        assert row[right].mean() > row[~right].mean() + 0.25


def test_thresholds_meet_their_targets_at_falling_cost():
    data = made_data()
    fitted = fit_predictors(data, lambda n: None)
    exits = score_exits(data, fitted)
    found = calibrate(exits, COSTS)
    for calibration in found:
        assert calibration.agreement >= calibration.target - 1e-6
        thresholds = [calibration.thresholds.get(layer, NEVER) for layer in data.layers]
        # as on the texts that had no part in choosing the thresholds
        exit_layer, cost, correct = replay(exits.part(data.text % 2 == 1), thresholds, COSTS)
        assert calibration.agreement == pytest.approx(float(correct.float().mean()))
        assert calibration.mean_exit_layer == pytest.approx(float(exit_layer.float().mean()))
        assert calibration.speedup == pytest.approx(COSTS.dense / float(cost.mean()))
    speeds = [calibration.speedup for calibration in found]
    assert speeds == sorted(speeds, reverse=True) and speeds[0] > 1.1
    # an exit costs more than it saves: no token exits, and no predictor is evaluated
    expensive = Costs(num_layers=10, head=0.0, draft=0.0, predictor=0.05, verify=50.0)
    assert calibrate(exits, expensive, (0.9,))[0].thresholds == {}


def test_the_bound_is_that_of_a_kind_of_text_not_among_those_measured():
    torch.manual_seed(0)
    kept = {True: 0, False: 0}
    for _ in range(200):
        # the share of correct tokens differs by kind, and from text to text
        share = (0.92 + 0.03 * torch.randn(9)).clamp(0, 1)
        correct = torch.rand(9, 60, 20) < (share[:, None, None] + 0.02 * torch.randn(9, 60, 1))
        kind = torch.arange(9)[:, None, None].expand(9, 60, 20)
        text = torch.arange(540).view(9, 60, 1).expand(9, 60, 20)
        seen = [part[:8].flatten() for part in (correct, text, kind)]
        other = float(correct[8].float().mean())
        kept[True] += agreement_bound(*seen) <= other
        kept[False] += agreement_bound(seen[0], seen[1], torch.zeros_like(seen[2])) <= other
    # the promise; without the kinds it is broken far more often
    assert kept[True] >= 0.84 * 200 > 0.75 * 200 > kept[False]


def test_the_bound_of_few_kinds_counts_texts_not_tokens():
    torch.manual_seed(0)
    correct = (torch.arange(20) % 10 > 0).repeat_interleave(50)
    text = torch.arange(20).repeat_interleave(50)
    kind = torch.zeros_like(text)
    alone = agreement_bound(correct, torch.arange(1000), kind)
    assert agreement_bound(correct, text, kind) < alone < float(correct.float().mean())
    # nothing wrong in ten texts is no promise
    assert 0.5 < agreement_bound(correct | True, text // 2, kind) < 0.9
    # one text says nothing of others
    assert agreement_bound(correct, torch.zeros_like(text), kind) == 0.0


def test_the_dense_answer_is_found_in_float32():
    torch.manual_seed(0)
    z, head = torch.randn(300, 32).bfloat16(), torch.randn(500, 32).bfloat16()
    assert torch.equal(best_token(z, head), (z.float() @ head.float().T).argmax(-1))


def test_training_end_to_end_and_taken_up_after_a_stop(examples, tmp_path):
    model = tiny_model("llama")
    with pytest.raises(KeyboardInterrupt):
        Trainer(model, tmp_path, Watch("draft head"), 64, hot_tokens=64).run(examples)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("translator-*")}
    assert list(before) == ["translator-3.safetensors"]
    watch = Watch()
    artifact = Trainer(model, tmp_path, watch, 64, hot_tokens=64).run(examples)
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("translator-*")} == before
    assert artifact.presets["default"].draft_layer == 3
    assert {"default", "paper"} == set(artifact.presets)
    assert artifact.tensors["hot.ids"].shape == (64,)
    assert artifact.tensors["predictor.default.4.w1"].shape == (512, 96)
    assert artifact.tensors["predictor.paper.3.w1"].shape == (512, 12)
    assert artifact.report["tokens"]["fit"] == 20 * 12
    assert artifact.tensors["eagle.hot.ids"].shape == (64,)
    assert artifact.tensors["eagle.features"].tolist() == [2, 3]
    assert [set(hit) for hit in artifact.report["draft_head"]["hits"]] == [{"top1", "top4"}] * 4
    again = Trainer(model, tmp_path, Watch(), 64, hot_tokens=64).run(examples)
    assert all(torch.equal(again.tensors[n], t) for n, t in artifact.tensors.items())
    further = Trainer(model, tmp_path / "further", Watch(), 64, hot_tokens=64)
    further.start_from(artifact, "first")
    assert torch.equal(further.start["fc"], artifact.tensors["eagle.fc"])
    further.start_from(artifact, "first", keep_exits=True)
    made = further.run(examples)
    changed = {n for n, t in made.tensors.items() if not torch.equal(t, artifact.tensors[n])}
    assert changed and all(name.startswith(("eagle.", "predictor.paper.")) for name in changed)
    assert made.presets["default"] == artifact.presets["default"]
    assert set(made.tensors) == set(artifact.tensors)
    other = Trainer(tiny_model("llama", hidden_size=32), tmp_path / "other", Watch(), 64)
    with pytest.raises(InputError, match="first: its draft head has no tensor"):
        other.start_from(artifact, "first")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep_exits": True}, "give it as start"),
        ({"start": "DIR", "draft": "none"}, "draft='none' trains none"),
    ],
)
def test_options_that_contradict_one_another(tmp_path, given, message):
    with pytest.raises(InputError, match=message):
        train(None, tmp_path, **given)
    assert not list(tmp_path.iterdir())


def test_without_a_draft_head_there_is_no_paper_preset(examples, tmp_path):
    model = tiny_model("llama", num_hidden_layers=2)
    artifact = Trainer(model, tmp_path, Watch(), 64, hot_tokens=64, draft="none").run(examples)
    assert set(artifact.presets) == {"default"}
    assert not any(name.startswith("eagle.") for name in artifact.tensors)
    # the prompt drafts in its place, unless the head is asked for by name
    transformed = eepass.transform(model, artifact, max_length=64)
    assert isinstance(transformed.engine.draft, SuffixDraft)
    with pytest.raises(InputError, match="no draft head"):
        transformed.configure(ExitConfig(speculate="eagle"))


def test_a_shard_that_was_not_finished_is_not_counted(tmp_path):
    store = HiddenStateStore(tmp_path, (1,))
    store.add("fit", {"token": torch.zeros(3)})
    store.flush(2)
    (tmp_path / ".fit-0000009.safetensors.part").write_bytes(b"half")
    store = HiddenStateStore(tmp_path, (1,))
    assert store.examples_done == 2 and len(store.read("fit", "token")) == 3
    assert json.loads((tmp_path / "done.json").read_text())["examples"] == 2
