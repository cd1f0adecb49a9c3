"""Text without transformers is what it is with them."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from eepass.checkpoints.text_stream import TextStream
from eepass.checkpoints.tokenizer import FolderTokenizer
from eepass.errors import InputError

TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {{ '<' + message.role + '>' }} {{ message.content | tojson }}{{ eos_token }}
{%- endfor %}
{% if not messages %}{{ raise_exception('nobody speaks') }}{% endif %}
{% if add_generation_prompt %}<assistant>{% endif %}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: n for n, c in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.chat_template = TEMPLATE
    made.save_pretrained(path)
    return path


def test_tokens_and_text_are_the_same(folder):
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    ours = FolderTokenizer(folder)
    assert ours.eos_token_id == theirs.eos_token_id == 1
    for text in ("hello", " two  spaces\n", "naïve «Ελλάδα» 你好", "a</s>b"):
        ids = theirs(text)["input_ids"]
        assert ours(text)["input_ids"] == ids
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
        messages = [{"role": "system", "content": "x"}, {"role": "user", "content": text + '"<&'}]
        for prompt in (True, False):
            assert ours.apply_chat_template(messages, prompt) == theirs.apply_chat_template(
                messages, add_generation_prompt=prompt, return_dict=False
            )


def test_text_streams_in_whole_characters(folder):
    text = "naïve «Ελλάδα» 你好"
    tokenizer = FolderTokenizer(folder)
    ids = tokenizer(text)["input_ids"]
    # a token is a byte here
    assert len(ids) > len(text)
    stream = TextStream(lambda some: tokenizer.decode(some, skip_special_tokens=True))
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) == text and set(map(len, pieces)) == {0, 1}
    assert stream.rest() == ""
    cut = TextStream(tokenizer.decode)
    assert "".join(map(cut.add, ids[:-1])) == "<s>" + text[:-1] and cut.rest() == "\ufffd"


def test_what_cannot_be_read_says_so(folder, tmp_path):
    with pytest.raises(InputError, match="tokenizer cannot be read"):
        FolderTokenizer(tmp_path)
    ours = FolderTokenizer(folder)
    ours.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        ours.apply_chat_template([])
