"""A tiny model on disk whose tokens are the words w0, w1 …, and prompts for it."""

import json

from models import VOCABULARY, random_artifact, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = {**{f"w{n}": n for n in range(VOCABULARY - 1)}, "<unk>": VOCABULARY - 1}


def save_word_model(path, artifact=True, **changes):
    model = tiny_model("llama", **changes)
    # an end token that is never the likeliest: answers have the length that was asked for
    model.lm_head.weight.data[2] = 0.0
    model.save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel(WORDS, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="w2", unk_token="<unk>"
    ).save_pretrained(path)
    if artifact:
        random_artifact(model).save(path / "eepass")
    return path


def write_prompts(file, count=60):
    texts = [" ".join(f"w{(7 * i + j) % 150 + 3}" for j in range(5)) for i in range(count)]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return file
