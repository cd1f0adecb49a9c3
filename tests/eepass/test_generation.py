"""``generate(custom_generate=eepass.generate)`` against transformers' own loop."""

import threading

import pytest
import torch
from models import VOCABULARY, tiny_tokenizer
from prepared_model import PROMPT, Recorder, both, prepared_model
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

import eepass
from eepass.errors import InputError
from eepass.hf.prepared import in_use

BATCH = torch.tensor([[0, 0, 0, 5, 6, 7], [9, 10, 11, 12, 13, 14], [0, 0, 0, 0, 0, 77]])
MASK = (BATCH != 0).long()


@pytest.fixture(scope="module")
def model():
    return prepared_model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


class Count(StoppingCriteria):
    """Says yes at the ``nth`` call; depends on being asked once for each token."""

    def __init__(self, nth):
        self.nth, self.seen = nth, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(int(input_ids[0, -1]))
        return torch.full((len(input_ids),), len(self.seen) >= self.nth)


class Even(LogitsProcessor):
    """Even tokens alone, and in turns those above and below the middle: state and context."""

    def __init__(self):
        self.lengths = []

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.shape[1])
        scores[:, 1::2] = -torch.inf
        half = slice(0, 80) if len(self.lengths) % 2 else slice(80, None)
        scores[:, half] -= 30.0
        return scores


def test_greedy_equals_transformers(model):
    theirs, ours = both(model, max_new_tokens=64)
    assert torch.equal(theirs, ours)
    with in_use(model, 1) as transformed:
        summary = transformed.statistics.summary()
    # by drafts, and exits that were taken back: not by dense decoding under another name
    assert summary["accepted_per_pass"] > 0 and summary["rollbacks"] > 0


def test_prepare_makes_it_the_models_own_way(model):
    with in_use(model, 1) as transformed:
        before = transformed.statistics.passes
        model.generate(PROMPT, max_new_tokens=8, do_sample=False)
        assert transformed.statistics.passes > before
        after = transformed.statistics.passes
        model.generate(PROMPT, max_new_tokens=8, do_sample=False, custom_generate=None)
        assert transformed.statistics.passes == after


def test_a_left_padded_batch_says_what_each_prompt_says_alone(model):
    theirs, ours = both(model, BATCH, attention_mask=MASK)
    assert torch.equal(theirs, ours)
    for row, ids in enumerate(BATCH):
        alone = both(model, ids[MASK[row].bool()][None])[1][0]
        assert alone[-32:].tolist() == ours[row, -32:].tolist()


def test_a_batch_larger_than_the_cache_takes_turns(model):
    ids = torch.randint(3, VOCABULARY, (5, 20), generator=torch.Generator().manual_seed(3))
    theirs, ours = both(model, ids, max_new_tokens=60)
    assert 5 * 80 > 256 and torch.equal(theirs, ours)


def test_end_tokens_end_their_rows_and_pads_follow(model):
    said = both(model, BATCH, attention_mask=MASK)[0]
    ends = [int(said[0, 6 + 5]), int(said[1, 6 + 9])]
    options = {"attention_mask": MASK, "eos_token_id": ends, "pad_token_id": 3}
    theirs, ours = both(model, BATCH, **options)
    assert torch.equal(theirs, ours)
    assert (ours[:, 6:] == 3).any() and ours.shape[1] > 6 + 6


def test_lengths(model):
    theirs, ours = both(model, max_new_tokens=None, max_length=17)
    assert torch.equal(theirs, ours) and ours.shape[1] == 17
    ends = both(model)[0][0, 10:].unique().tolist()
    theirs, ours = both(model, eos_token_id=ends, min_new_tokens=7, max_new_tokens=20)
    assert torch.equal(theirs, ours) and ours.shape[1] > 10 + 7
    # the padded width counts as transformers counts it
    padded = {"attention_mask": MASK, "eos_token_id": ends, "pad_token_id": 0}
    theirs, ours = both(model, BATCH, min_new_tokens=5, **padded)
    assert torch.equal(theirs, ours)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": [93, 136, 52]},
        {"bad_words_ids": [[93], [136, 136]]},
        {"sequence_bias": {(60,): 20.0}},
        {"encoder_repetition_penalty": 1.5},
        {"encoder_no_repeat_ngram_size": 1, "sequence_bias": {(77,): 90.0}},
        {"forced_eos_token_id": 2},
        {"exponential_decay_length_penalty": (4, 1.6), "eos_token_id": 2},
        {"prefix_allowed_tokens_fn": lambda row, ids: [9 + row, 40 + row, 90 + len(ids) % 7]},
        {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2, "min_new_tokens": 9},
    ],
    ids=lambda options: "+".join(options),
)
def test_what_bends_the_distribution_is_obeyed(model, options):
    plain = both(model, BATCH, attention_mask=MASK)[1]
    theirs, ours = both(model, BATCH, attention_mask=MASK, **options)
    assert torch.equal(theirs, ours)
    assert not torch.equal(ours, plain)


def test_the_callers_processors_are_asked_once_for_each_token_in_order(model):
    mine = Even()
    theirs, ours = (
        model.generate(
            PROMPT, max_new_tokens=24, do_sample=False, custom_generate=way,
            logits_processor=LogitsProcessorList([processor]),
        )
        for way, processor in ((None, Even()), (eepass.generate, mine))
    )  # fmt: skip
    assert torch.equal(theirs, ours)
    assert mine.lengths[:24] == list(range(10, 34))
    several = [
        model.generate(
            BATCH, attention_mask=MASK, max_new_tokens=24, do_sample=False, custom_generate=way,
            logits_processor=LogitsProcessorList([Even()]),
        )
        for way in (None, eepass.generate)
    ]  # fmt: skip
    assert torch.equal(*several)


def test_processors_that_leave_nothing_are_an_error(model):
    def nothing(ids, scores):
        return torch.full_like(scores, -torch.inf)

    with pytest.raises(InputError, match="no token is left"):
        model.generate(PROMPT, max_new_tokens=4, logits_processor=LogitsProcessorList([nothing]))
    assert_empty(model)


def test_sampling_draws_from_the_same_distribution(model):
    options = {"do_sample": True, "temperature": 0.9, "top_k": 12, "top_p": 0.9, "min_p": 0.02}
    ids = PROMPT.expand(400, -1)
    torch.manual_seed(0)
    theirs, ours = both(model, ids, max_new_tokens=2, **options)
    for column in (-2, -1):
        said = [
            torch.bincount(rows[:, column], minlength=VOCABULARY) / 400 for rows in (theirs, ours)
        ]
        # two fair samples of 400 over a dozen tokens: 0.09 is seen, 0.2 is not
        assert (said[0] - said[1]).abs().sum() / 2 < 0.16
        assert (said[1] > 0).sum() > 3


def test_seeds(model):
    def drawn(seed, **options):
        torch.manual_seed(seed)
        return model.generate(PROMPT, max_new_tokens=16, do_sample=True, **options)

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    several = drawn(1, num_return_sequences=3)
    assert several.shape == (3, 26) and len({tuple(row) for row in several.tolist()}) == 3
    assert torch.equal(drawn(1, typical_p=0.8), drawn(1, typical_p=0.8))


def test_scores_and_logits(model):
    options = {
        "return_dict_in_generate": True, "output_scores": True, "output_logits": True,
        "attention_mask": MASK, "repetition_penalty": 1.4, "max_new_tokens": 12,
    }  # fmt: skip
    theirs, ours = both(model, BATCH, **options)
    assert torch.equal(theirs.sequences, ours.sequences)
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)
    plain = model.generate(PROMPT, max_new_tokens=4, return_dict_in_generate=True)
    assert plain.scores is None and plain.sequences.shape == (1, 14)


def test_streamers_see_each_token_once_and_in_order(model, tokenizer, capsys):
    streamer = Recorder()
    said = model.generate(PROMPT, max_new_tokens=40, do_sample=False, streamer=streamer)
    prompt, *tokens = streamer.put_values
    assert torch.equal(prompt, PROMPT) and streamer.ended == 1
    assert [t.shape for t in tokens] == [(1,)] * 40
    assert torch.cat(tokens).tolist() == said[0, 10:].tolist()
    printer = TextStreamer(tokenizer, skip_prompt=True)
    model.generate(PROMPT, max_new_tokens=12, do_sample=False, streamer=printer)
    assert capsys.readouterr().out == tokenizer.decode(said[0, 10:22]) + "\n"
    # a batch goes out column by column
    streamer = Recorder()
    ends = int(both(model, BATCH, attention_mask=MASK)[0][0, 6 + 5])
    said = model.generate(
        BATCH, attention_mask=MASK, eos_token_id=ends, pad_token_id=0, max_new_tokens=20,
        do_sample=False, streamer=streamer,
    )  # fmt: skip
    assert torch.equal(torch.stack(streamer.put_values[1:], 1), said[:, 6:])


def test_a_stream_is_read_while_it_is_written(model, tokenizer):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    options = {"max_new_tokens": 24, "do_sample": False}
    thread = threading.Thread(
        target=model.generate, args=(PROMPT,), kwargs={**options, "streamer": streamer}
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(both(model, **options)[0][0, 10:])


def test_a_streamer_that_raises_frees_the_engine(model):
    class Leaves(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.put_values) == 5:
                raise ConnectionError("the reader is gone")

    with pytest.raises(ConnectionError):
        model.generate(PROMPT, max_new_tokens=40, streamer=Leaves())
    assert_empty(model)
    assert torch.equal(*both(model))


def assert_empty(model):
    with in_use(model, 1) as transformed:
        assert transformed.decoder.kv.unused and not transformed.engine.sequences


def test_stop_strings(model, tokenizer):
    said = tokenizer.decode(both(model)[0][0, 10:])
    stop = said[len(said) // 2 :][:4]
    theirs, ours = both(model, stop_strings=[stop], tokenizer=tokenizer)
    assert torch.equal(theirs, ours) and ours.shape[1] < 42
    assert stop in tokenizer.decode(ours[0, 10:])


def test_stopping_criteria_are_asked_once_for_each_token(model):
    counts = Count(9), Count(9)
    for way, count in zip((None, eepass.generate), counts, strict=True):
        said = model.generate(
            PROMPT, max_new_tokens=30, do_sample=False, stopping_criteria=[count],
            custom_generate=way,
        )  # fmt: skip
        assert said.shape[1] == 10 + 9
    assert counts[0].seen == counts[1].seen
    assert_empty(model)


def test_rows_end_where_their_criterion_says(model):
    def long_enough(ids, scores):
        return torch.tensor([int(row[-1]) % 5 == 0 for row in ids])

    options = {"attention_mask": MASK, "eos_token_id": 159, "pad_token_id": 0}
    theirs, ours = both(model, BATCH, stopping_criteria=[long_enough], **options)
    assert torch.equal(theirs, ours)
    with pytest.raises(InputError, match="row by row"):
        model.generate(
            BATCH, attention_mask=MASK, stopping_criteria=[lambda ids, s: torch.tensor([False] * 3)]
        )
    with pytest.raises(InputError, match="pad_token_id"):
        model.generation_config.pad_token_id = None
        try:
            model.generate(BATCH, attention_mask=MASK, stopping_criteria=[long_enough])
        finally:
            model.generation_config.pad_token_id = 0


def test_pipeline(model, tokenizer):
    options = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    texts = ["hello", "a longer one"]
    said = {}
    for way in (None, eepass.generate):
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
        found = pipe(texts, batch_size=2, custom_generate=way, **options)
        said[way] = [one["generated_text"] for (one,) in found]
    assert said[None] == said[eepass.generate] and len(set(said[None])) == 2


def test_two_threads_at_once(model):
    seeded = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, VOCABULARY, (1, n), generator=seeded) for n in (4, 9, 15, 12)]
    expected = [both(model, ids, max_new_tokens=40)[0] for ids in prompts]
    said = [None] * len(prompts)

    def work(at):
        said[at] = model.generate(prompts[at], max_new_tokens=40, do_sample=False)

    threads = [threading.Thread(target=work, args=(at,)) for at in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(expected, said, strict=True))
