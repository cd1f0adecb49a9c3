"""Adapters of PEFT on a prepared model: attached, switched, rescaled, disabled, merged."""

import pytest
import torch
from models import tiny_model

import eepass
from eepass.errors import InputError

peft = pytest.importorskip("peft", reason="the extra 'dev' is not installed")
pytestmark = pytest.mark.slow

PROMPT = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 5, 6, 7]])
OPTIONS = {"max_new_tokens": 24, "do_sample": False}


@pytest.fixture
def base():
    found = tiny_model("llama", num_hidden_layers=2)
    found.generation_config.update(eos_token_id=None, pad_token_id=0)
    return found


def lora(seed, rank=4, dropout=0.0):
    torch.manual_seed(seed)
    return peft.LoraConfig(
        r=rank, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"],
        lora_dropout=dropout, init_lora_weights=False,
    )  # fmt: skip


def with_adapter(base):
    return peft.get_peft_model(base, lora(1), adapter_name="one").eval()


class Witness:
    """Both answers, which must be equal, and all that there have been."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def differs(self, **options):
        """The answer is transformers' own and none of those before."""
        said = self.same(**options)
        assert all(not torch.equal(said, other) for other in self.seen), "nothing has changed"
        self.seen.append(said)

    def same(self, **options):
        theirs = self.model.generate(PROMPT, custom_generate=None, **OPTIONS, **options)
        ours = self.model.generate(PROMPT, **OPTIONS, **options)
        assert torch.equal(theirs, ours)
        return ours


def adapted(base):
    """The base model's answer, and the witness of an adapter attached to it after that."""
    eepass.prepare(base, None, max_length=64)
    plain = Witness(base)
    plain.differs()
    witness = Witness(with_adapter(base))
    witness.seen = plain.seen
    return plain.seen[0], witness


def test_attached_switched_and_disabled(base):
    plain, witness = adapted(base)
    witness.differs()
    model = witness.model
    model.add_adapter("two", lora(2))
    model.eval()
    model.set_adapter("two")
    witness.differs()
    with model.disable_adapter():
        assert torch.equal(witness.same(), plain)
    model.set_adapter("one")
    assert torch.equal(witness.same(), witness.seen[1])


def test_rescaled(base):
    _, witness = adapted(base)
    witness.differs()
    modules = list(witness.model.modules())
    for module in modules:
        if hasattr(module, "scale_layer"):
            module.scale_layer(3.0)
    witness.differs()
    for module in modules:
        if hasattr(module, "set_scale"):
            module.set_scale("one", 0.25)
    witness.differs()


def test_mixed_merged_and_unloaded(base):
    _, witness = adapted(base)
    model = witness.model
    model.add_adapter("two", lora(2))
    model.add_weighted_adapter(["one", "two"], [0.7, 0.3], "mixed", combination_type="linear")
    model.eval()
    model.set_adapter("mixed")
    witness.differs()
    model.merge_adapter(["one"])
    witness.same()
    model.unmerge_adapter()
    model.delete_adapter("mixed")
    model.set_adapter("two")
    merged = Witness(model.merge_and_unload())
    assert merged.model is base
    merged.same()


def test_weights_of_an_adapter_loaded_over_those_there_were(base, tmp_path):
    eepass.prepare(base, None, max_length=64)
    with_adapter(base).save_pretrained(tmp_path)
    del base
    again = tiny_model("llama", num_hidden_layers=2)
    again.generation_config.update(eos_token_id=None, pad_token_id=0)
    eepass.prepare(again, None, max_length=64)
    witness = Witness(again)
    witness.differs()
    again.load_adapter(str(tmp_path / "one"), adapter_name="hub")
    witness.differs()
    again.disable_adapters()
    assert torch.equal(witness.same(), witness.seen[0])
    again.enable_adapters()
    assert torch.equal(witness.same(), witness.seen[1])


def test_prepared_itself_it_is_the_model_inside(base):
    model = with_adapter(base)
    eepass.prepare(model, None, max_length=64)
    witness = Witness(model)
    witness.differs()
    with model.disable_adapter():
        witness.differs()
    assert "generate" in vars(base) and "generate" not in vars(model)


def test_adapters_by_row_are_refused(base):
    """PEFT chooses them in hooks, while it generates."""
    model = with_adapter(base)
    model.add_adapter("two", lora(2))
    eepass.prepare(model.eval(), None, max_length=64)
    with pytest.raises(InputError, match="has a forward hook"):
        model.generate(PROMPT, adapter_names=["two"], **OPTIONS)


def test_dropout_that_is_on_is_refused(base):
    eepass.prepare(base, None, max_length=64)
    model = peft.get_peft_model(base, lora(1, dropout=0.5))
    with pytest.raises(InputError, match=r"training mode: call model.eval\(\)"):
        model.generate(PROMPT, **OPTIONS)
