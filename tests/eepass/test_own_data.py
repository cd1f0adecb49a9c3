"""Prompts and answers that a model writes itself, and the hidden states collected on the way."""

import pytest
import torch
from models import VOCABULARY, tiny_model

from eepass.runtime.sampling import GREEDY, Sampling
from eepass.training import hidden_states, own_data, prompts
from eepass.training.answers import write_answers
from eepass.training.corpus import HELD_OUT, SPLITS, Example, Prompt, split_of
from eepass.training.dense_model import DenseModel
from eepass.training.hidden_states import Collector, HiddenStateStore
from eepass.training.near_duplicates import NearDuplicates
from eepass.training.own_data import OwnData
from eepass.training.progress import NoProgress, RecordFile
from eepass.training.prompts import FOLLOW_UP, write_prompts
from eepass.training.writer import Task, Writer

STOP = frozenset({2})
LAYERS = (2, 3)


class Words:
    """A tokenizer whose text is its tokens' numbers."""

    def encode(self, text, add_special_tokens=False):
        return [3 + sum(map(ord, word)) % (VOCABULARY - 3) for word in text.split()]

    def decode(self, tokens):
        return " ".join(map(str, tokens))


class Chatty:
    """A loaded model whose user's turns stand between the tokens 5, 6 and 7."""

    stop, tokenizer = STOP, Words()

    def turn(self):
        return [5, 6], [7]

    def next_turn(self):
        return [2, 5, 6]


@pytest.fixture(scope="module")
def model():
    return DenseModel(tiny_model("llama"), 96)


def made_prompts(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        length = 3 + index % 9
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        made.append(Prompt(ids, ("code", "chat")[index % 2], split_of(ids)))
    return made


def one_by_one(model, ids, room, sampling=GREEDY):
    return [step.token for step in model.engine.generate(ids, room, STOP, sampling)]


def test_a_batch_does_not_change_answers(model):
    tasks = [Task(prompt.ids, 5 + n % 7, GREEDY) for n, prompt in enumerate(made_prompts(70))]
    written = [answer for answer, _ in Writer(model, STOP).write(tasks)]
    assert written == [one_by_one(model, *task) for task in tasks]
    assert model.decoder.kv.unused


def test_answers_are_those_of_the_eager_model(model):
    for prompt in made_prompts(3):
        ((answer, _),) = Writer(model, STOP).write([Task(prompt.ids, 12, GREEDY)])
        ids = torch.tensor([[*prompt.ids, *answer]])
        dense = model.original(ids).logits[0, len(prompt.ids) - 1 : -1].argmax(-1)
        assert dense.tolist() == answer


def test_sampled_answers_go_by_their_seed_alone(model):
    ids, hot = [9, 8, 7], 5.0

    def written(*seeds):
        tasks = [Task(ids, 12, Sampling(hot, seed=seed)) for seed in seeds]
        return [answer for answer, _ in Writer(model, STOP).write(tasks)]

    first, second, again = written(1, 2, 1)
    assert first == again != second
    assert written(3, 4, 2)[2] == second


def test_hidden_states_on_the_way_are_those_of_a_second_pass(model, tmp_path):
    stores = []
    for name in ("on the way", "afterwards"):
        store = HiddenStateStore(tmp_path / name, LAYERS, (1,))
        collector = Collector(model, store, NoProgress())
        way = collector if name == "on the way" else None
        writer = Writer(model, STOP, collector.layers if way else ())
        path = tmp_path / f"{name}.jsonl"
        examples = write_answers(
            writer, made_prompts(40), 200, path, NoProgress(), collector=way, longest=9
        )
        if way is None:
            # then the dense tokens are computed, not taken from the answers
            examples = [example._replace(greedy=False) for example in examples]
        assert (collector.taken == len(examples)) == (way is not None)
        collector.finish(examples)
        stores.append(store)
    one, other = stores
    for split, _ in SPLITS:
        assert len(one.labels(split)) > 5
        assert torch.equal(one.labels(split), other.labels(split))
        for name in ("z", "boundary.2", "line.features", "line.token", "line.kind", "line.answer"):
            torch.testing.assert_close(one.read(split, name), other.read(split, name))
    lines, label = one.lines_by_kind("fit")["code"]
    # after the last token of a prompt comes the first of its answer
    assert (lines.token[1:][label[:-1] >= 0] == label[:-1][label[:-1] >= 0]).float().mean() > 0.8


class Stops(NoProgress):
    """Stops a run as Ctrl-C does, when a stage has advanced so often."""

    def __init__(self, stage, times):
        self.stage, self.times = stage, times

    def begin(self, stage, total):
        self.counts = stage == self.stage

    def advance(self, amount):
        self.times -= self.counts
        if not self.times:
            raise KeyboardInterrupt


def test_a_run_that_was_stopped_gives_the_same_files(model, tmp_path, monkeypatch):
    monkeypatch.setattr(hidden_states, "SHARD_TOKENS", 60)

    def run(name, progress):
        folder = tmp_path / name
        store = HiddenStateStore(folder / "shards", LAYERS)
        collector = Collector(model, store, progress)
        data = OwnData(Chatty(), folder, collector, progress)
        examples = data.write(made_prompts(30), 20, 900, 1, 1.5)
        collector.finish(examples)
        return store, examples

    whole, examples = run("whole", NoProgress())
    for stage, times in (
        ("writing prompts", 7), ("generating answers", 4), ("writing further turns", 2),
        ("sampling answers", 3),
    ):  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            run("stopped", Stops(stage, times))
    # and in the middle of a line
    file = tmp_path / "stopped" / "answers.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    resumed, again = run("stopped", NoProgress())
    assert again == examples
    for path in (tmp_path / "whole").glob("*.jsonl"):
        assert path.read_bytes() == (tmp_path / "stopped" / path.name).read_bytes(), path.name
    for split in ("fit", "predict", "calibrate"):
        assert torch.equal(whole.labels(split), resumed.labels(split))
        torch.testing.assert_close(whole.read(split, "z"), resumed.read(split, "z"))


def test_half_a_record_is_dropped(tmp_path):
    path = tmp_path / "records.jsonl"
    RecordFile(path).append({"a": 1})
    path.write_bytes(path.read_bytes() + b'{"a": 2')
    file = RecordFile(path)
    file.append({"a": 3})
    assert [record["a"] for record in RecordFile(path).records] == [1, 3]


def test_texts_in_nearly_the_same_words_are_dropped():
    seen = NearDuplicates()
    first = "How do I sort a list of numbers by their absolute value in Python?"
    assert seen.is_new(first)
    assert not seen.is_new(first.upper())
    assert not seen.is_new(first.replace("numbers", "integers"))
    assert seen.is_new("How do I sort a list of words by their length in Rust?")
    assert seen.is_new("x = a + b") and seen.is_new("x = a - b") and not seen.is_new("x = a + b")


def test_a_model_writes_its_own_prompts_once(model, tmp_path):
    writer, file = Writer(model, STOP), tmp_path / "prompts.jsonl"
    made = write_prompts(writer, Chatty(), 60, file, NoProgress())
    assert len({tuple(prompt.ids) for prompt in made}) == 60
    for prompt in made:
        assert prompt.ids[:2] == [5, 6] and prompt.ids[-1] == 7 and 2 not in prompt.ids
    # taken up again they are the same, and only those missing are written
    again = write_prompts(writer, Chatty(), 64, file, NoProgress())
    assert again[:60] == made and len(again) == 64


def test_own_prompts_that_repeat_each_other_are_dropped(model, tmp_path, monkeypatch):
    # without randomness and with one stem the model has one thing to say
    monkeypatch.setattr(prompts, "topics", lambda: [prompts.Topic("free", [""], False)])
    monkeypatch.setattr(prompts, "_sampling", lambda number: GREEDY)
    made = write_prompts(Writer(model, STOP), Chatty(), 5, tmp_path / "p.jsonl", NoProgress())
    assert len(made) == 1


def test_kinds_are_in_every_split_but_those_held_out(model, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "LONGEST", 4)
    some = [topic for topic in prompts.topics() if topic.kind in ("json", "table", FOLLOW_UP)]
    monkeypatch.setattr(prompts, "topics", lambda: some)
    monkeypatch.setattr(own_data, "FIRST_TURNS", 2)
    store = HiddenStateStore(tmp_path / "shards", LAYERS)
    collector = Collector(model, store, NoProgress())
    data = OwnData(Chatty(), tmp_path, collector, NoProgress())
    examples = data.write([], 90, 6_000, 1, 1.0)
    kinds = {}
    for example in examples:
        kinds.setdefault(example.split, set()).add(example.kind)
    assert kinds == {
        **{split: {"json", FOLLOW_UP} for split, _ in SPLITS}, HELD_OUT: {"table"}
    }  # fmt: skip
    # a further turn is in the split of the conversation it goes on with
    splits = {tuple(prompt.ids): prompt.split for prompt in data.own}
    for prompt in data.own:
        if prompt.kind == FOLLOW_UP:
            begun = [split for ids, split in splits.items() if prompt.ids[: len(ids)] == [*ids]]
            assert len(begun) == 2 and len(set(begun)) == 1
    # what is measured is greedy
    assert {example.split for example in examples if not example.greedy} == {"fit"}


def test_the_shipped_topics_have_kinds_of_code_and_text_to_hold_out():
    held_out = {topic.kind for topic in prompts.topics() if topic.held_out}
    assert {"comparison", "table", "code-sql"} == held_out
    assert sum(topic.kind.startswith("code-") for topic in prompts.topics()) > 5


def test_hidden_states_are_bounded_on_disk(model, tmp_path, monkeypatch):
    monkeypatch.setattr(hidden_states, "MOST_FIT", 30)
    store = HiddenStateStore(tmp_path, LAYERS, (), fitted=(3,))
    examples = [Example([4, 5, 6 + n], [7] * 10, ("fit", "predict")[n % 2]) for n in range(16)]
    Collector(model, store, NoProgress()).finish(examples)
    assert len(store.read("fit", "boundary.3")) == len(store.read("fit", "z")) == 30
    assert len(store.labels("fit")) == 80 and len(store.lines("fit").token) == 8 * 12
    assert len(store.read("predict", "boundary.2")) == len(store.read("predict", "z")) == 80
    with pytest.raises(Exception, match=r"boundary\.2"):
        store.read("fit", "boundary.2")
