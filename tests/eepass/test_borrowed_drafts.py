"""Drafts that a checkpoint brings: MTP layers and DFlash models, beside transformers' own use."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from models import SIZES, VOCABULARY, AsTraced, eager_compile, tiny_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, GenerationConfig, MuseGlimmerAssistantConfig
from transformers import MuseGlimmerAssistantModel as DFlashModel
from transformers.generation.candidate_generator import (
    DFlashTokenCandidateGenerator,
    MTPCandidateGenerator,
)
from transformers.modeling_layers import MtpModel

import eepass
from eepass.config import ExitConfig
from eepass.draft_models import _unnormed, draft_from
from eepass.errors import InputError
from eepass.model import split_model
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.drafting import borrowed
from eepass.runtime.drafting.acceptance import MOST
from eepass.runtime.drafting.borrowed import DFlashDraft, MtpDraft
from eepass.runtime.drafting.budget import Budget
from eepass.runtime.drafting.features import Features
from eepass.runtime.drafting.planner import Planner
from eepass.runtime.engine.engine import Engine
from eepass.runtime.engine.options import Options

PROMPT = [63, 80, 29, 104, 125, 7, 31, 12, 90]
NEW = 40
WINDOW = 6
SPECULATION = Options("exact", modes=("speculation",))
# answers that do not run in circles at once
LIVELY = {"initializer_range": 0.15}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
# by name: the model's family and what its config says; none for a DFlash model beside it
KINDS = {
    "three MTP layers": (
        "Glm4Moe",
        {
            "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 3, **EXPERTS,
        },
    ),
    "an MTP layer with a window": (
        "Mellum",
        {
            "num_experts": 4, "num_nextn_predict_layers": 1, "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention"] * 2, **EXPERTS,
        },
    ),
    "DFlash": ("Llama", {}),
}  # fmt: skip


class Case:
    """A model with what drafts for it, trained on the one answer it gives to ``PROMPT``."""

    def __init__(self, name):
        family, changes = KINDS[name]
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**{**SIZES, **LIVELY, **changes})
        self.model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        torch.manual_seed(1)
        self.drafter = dflash_model() if name == "DFlash" else mtp_model(self.model)
        self.drafter.eval()
        self.splits = split_model(self.model, 128, (1, 8))[0]
        self.engine = Engine(Decoder(self.splits, eager_compile))
        self.answer = [step.token for step in self.engine.generate(PROMPT, NEW)]
        self.text = [*PROMPT, *self.answer]
        self.train()

    def draft(self, decoder=None):
        return draft_from(self.drafter, decoder or self.engine.decoder, self.model)

    def states(self, text):
        """Hidden states as transformers hands them over."""
        found = self.model(torch.tensor([text]), output_hidden_states=True)
        return [state.detach() for state in found.hidden_states]

    def reader(self, text, layers):
        """Reads features of ``text``, as a pass of the model leaves them."""
        states = self.states(text)
        rows = torch.cat([states[layer][0] for layer in (-1, *layers)], -1)

        def read(position, count):
            assert position >= 0 and position + count < len(text)
            return Features(rows[position : position + count], [True] * count)

        return read

    def candidates(self, text):
        """The draft tokens of transformers' own generator after ``text``, and their chances."""
        outputs = SimpleNamespace(hidden_states=self.states(text[:-1]))
        generator = own_generator(self.model, self.drafter)
        given = {"position_ids": torch.arange(len(text))[None], "attention_mask": None}
        ids, logits = generator.get_candidates(torch.tensor([text]), given, outputs, False, 0)
        tokens = ids[0, len(text) :]
        chances = logits[0].softmax(-1)[range(len(tokens)), tokens]
        return tokens.tolist(), chances.tolist()

    def train(self):
        shared = {id(parameter) for parameter in self.model.parameters()}
        own = [p for p in self.drafter.parameters() if id(p) not in shared]
        optimizer = torch.optim.Adam(own, 1e-2)
        with torch.enable_grad():
            for _ in range(STEPS):
                optimizer.zero_grad()
                loss = self.loss()
                loss.backward()
                optimizer.step()
        self.drafter.requires_grad_(False)

    def loss(self):
        text, states = torch.tensor(self.text), self.states(self.text)
        if isinstance(self.drafter, MtpModel):
            return mtp_loss(self.drafter, text, states[-1])
        return dflash_loss(self.drafter, self.model, text, states)


# of training; enough for most draft tokens to be right
STEPS = 60


def mtp_model(model):
    made = MtpModel(model, model.config.num_mtp_layers)
    for parameter in made.layers.parameters():
        # it is made to be read from a checkpoint
        parameter.data = torch.randn_like(parameter) * 0.1 + (parameter.ndim == 1)
    return made


def dflash_model(**changes):
    config = MuseGlimmerAssistantConfig(
        hidden_size=SIZES["hidden_size"], intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"], block_size=5, mask_token_id=3,
        target_layer_ids=[0, 3, 1], rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **changes,
    )  # fmt: skip
    return DFlashModel(config)


def mtp_loss(drafter, text, hidden):
    losses = []
    count = len(text) - drafter.num_mtp_layers - 1
    cache = transformers.cache_utils.MtpCache(config=drafter.config)
    hidden = hidden[:, :count]
    for depth in range(drafter.num_mtp_layers):
        first = 1 + depth
        positions = torch.arange(first, first + count)[None]
        ids = text[None, first : first + count]
        hidden = drafter.forward_layer(depth, hidden, positions, cache, input_ids=ids)
        logits = drafter._project_to_logits(hidden)[0]
        losses.append(cross_entropy(logits, text[first + 1 : first + 1 + count]))
    return sum(losses)


def dflash_loss(drafter, model, text, states):
    losses, block = [], drafter.config.block_size
    for end in range(len(PROMPT), len(text) - block, 3):
        noise = torch.tensor([[text[end], *[drafter.config.mask_token_id] * (block - 1)]])
        context = torch.cat([states[i + 1][:, :end] for i in drafter.config.target_layer_ids], -1)
        found = drafter(noise_embeds=model.get_input_embeddings()(noise), **{
            "context_hidden_states": context, "past_key_values": None,
            "position_ids": torch.arange(end + block)[None], "attention_mask": masks(end, block),
        })  # fmt: skip
        logits = model.get_output_embeddings()(found.last_hidden_state[:, 1:])[0]
        losses.append(cross_entropy(logits, text[end + 1 : end + block]))
    return sum(losses)


def masks(end, block):
    """What a block may attend to: everything, or what is near."""
    away = torch.arange(end, end + block)[:, None] - torch.arange(end + block)[None]
    near = away.abs() < WINDOW
    return {"full_attention": None, "sliding_attention": near[None, None]}


def own_generator(model, drafter):
    options = GenerationConfig(max_length=200, do_sample=False)
    if isinstance(drafter, MtpModel):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MtpModel, "from_pretrained", lambda *_, **__: drafter)
            return MTPCandidateGenerator(model, options, {})
    embeddings = model.get_input_embeddings(), model.get_output_embeddings()
    return DFlashTokenCandidateGenerator(drafter, *embeddings, options)


class Rich(Budget):
    """Nothing is too much for it."""

    def worth_a_row(self, joint):
        return True

    def worth_a_call(self, joint, level):
        return True


def proposed(draft, text, read):
    """Its draft tokens after ``text``, which it has followed, and their chances."""
    tree = draft.propose(text[-1], Rich(Planner({1: 1.0, 16: 1.01}), 15), read)
    assert tree.parents == list(range(-1, len(tree) - 1))
    return tree.tokens[1:], tree.chances[1:]


def like(drafted):
    """Equal to the same draft tokens with the same chances, but for rounding."""
    tokens, chances = drafted
    # no bin is surer than this
    return tokens, pytest.approx([min(chance, MOST) for chance in chances], rel=1e-3)


@pytest.fixture(scope="module")
def cases():
    found = {}

    def made(name):
        if name not in found:
            found[name] = Case(name)
        return found[name]

    return made


@pytest.fixture(params=KINDS)
def case(request, cases):
    return cases(request.param)


def test_draft_tokens_are_those_of_transformers(case):
    """In the engine, pass by pass, from the hidden states that its passes left."""
    decoder = Decoder(case.splits, eager_compile)
    draft, seen = case.draft(decoder), []
    engine = Engine(decoder, draft=noting(draft, seen), options=SPECULATION)
    generated = [step.token for step in engine.generate(PROMPT, NEW)]
    assert generated == case.answer
    assert engine.statistics.summary()["accepted_per_pass"] > 1.5
    assert len(seen) > 5
    for text, drafted in seen:
        # what is not worth a call is left out
        expected = zip(*case.candidates(text), strict=True)
        for (token, likely), (own, chance) in zip(drafted, expected, strict=False):
            assert token == own and likely == pytest.approx(chance, rel=1e-3)


def noting(draft, seen):
    """``draft``, of one sequence; into ``seen`` goes what it drafts after which text."""
    drafted = draft._drafted

    def noted(read):
        found = []
        seen.append((list(draft._tokens), found))
        for token, likely in drafted(read):
            found.append((token, likely))
            yield token, likely

    draft._drafted, draft.fresh = noted, lambda: draft
    return draft


def test_an_off_by_one_would_be_seen(case):
    """The reference is sharp: hidden states of the next position make other chances."""
    text = [(11 * at) % 150 for at in range(20)]
    draft = case.draft()
    read = case.reader([*text, 5, 9], draft.feature_layers)
    found = []
    for shift in (0, 1):
        fresh = draft.fresh()
        fresh.follow(text)
        found.append(proposed(fresh, text, lambda at, count, by=shift: read(at + by, count)))
    expected = like(case.candidates(text))
    assert found[0] == expected and found[1] != expected


def test_rejected_and_rolled_back_tokens_leave_no_trace(case):
    """Further back than the window reaches, and in a text that then goes on differently."""
    draft = case.draft()
    layers, text = draft.feature_layers, []
    for kept, end in ((0, 12), (12, 13), (13, 17), (17, 30), (30, 32), (8, 11), (2, 4), (4, 31)):
        draft.truncate(kept)
        new = case.text[kept:end] if end % 2 else [(7 * i + kept) % 150 for i in range(kept, end)]
        text = [*text[:kept], *new]
        draft.follow(new)
        read = case.reader(text, layers)
        fresh = draft.fresh()
        fresh.follow(text)
        expected = like(case.candidates(text))
        assert proposed(fresh, text, read) == expected
        assert proposed(draft, text, read) == expected, (kept, end)
        # asked twice
        assert proposed(draft, text, read) == expected
        held = {layer.get_seq_length() for layer in draft.cache.layers}
        assert held == {max(len(text) - draft.behind, 0)}


def test_a_prompt_is_run_in_chunks(case, monkeypatch):
    draft, text = case.draft(), case.text[:30]
    read = case.reader(text, draft.feature_layers)
    monkeypatch.setattr(borrowed, "CHUNK", 4)
    draft.follow(text)
    assert proposed(draft, text, read) == like(case.candidates(text))


def test_nothing_comes_before_a_first_token(case):
    draft = case.draft()
    draft.follow([5])
    assert proposed(draft, [5], case.reader([5, 6], draft.feature_layers)) == ([], [])
    draft.follow([6])
    read = case.reader([5, 6], draft.feature_layers)
    assert proposed(draft, [5, 6], read) == like(case.candidates([5, 6]))


def test_a_layer_is_run_when_it_may_pay(cases):
    """Of three MTP layers the first alone where another call is worth nothing."""
    case = cases("three MTP layers")
    draft, text = case.draft(), case.text[:20]
    draft.follow(text)
    read = case.reader(text, draft.feature_layers)
    dear = Budget(Planner({1: 1.0, 8: 1.01}, draft_seconds=50.0), 7)
    assert len(draft.propose(text[-1], dear, read)) == 2 and dear.calls == 1
    assert len(draft.propose(text[-1], Budget(Planner({1: 1.0, 8: 1.01}), 7), read)) == 4
    assert len(draft.propose(text[-1], Rich(Planner({1: 1.0, 8: 1.01}), 2), read)) == 3


def test_what_a_call_takes_is_measured(case):
    draft = case.draft()
    assert 0 < draft.call_seconds() < 1
    assert not draft._tokens and draft.calls == getattr(draft, "depths", 1)


def test_transform_takes_them(case, monkeypatch):
    monkeypatch.setattr("eepass.early_exit_model._cpu_compiler", AsTraced)
    monkeypatch.setattr("eepass.model._splits", lambda *_: (case.splits, None, ""))
    config = ExitConfig(speculate="model")
    made = eepass.transform(case.model, config=config, draft_model=case.drafter)
    kind = DFlashDraft if case.drafter.config.model_type == "muse_glimmer_assistant" else MtpDraft
    assert isinstance(made.engine.draft.head, kind)
    assert made.generate([PROMPT], NEW)[0].tolist() == case.text
    # another configuration has none unless given
    with pytest.raises(InputError, match="give transform a draft_model"):
        eepass.transform(made, config=config)


def test_a_transformed_model_takes_mtp_layers(cases, monkeypatch):
    case = cases("three MTP layers")
    monkeypatch.setattr("eepass.early_exit_model._cpu_compiler", AsTraced)
    monkeypatch.setattr("eepass.model._splits", lambda *_: (case.splits, None, ""))
    made = eepass.transform(case.model)
    config = ExitConfig(speculate="model")
    other = eepass.transform(made, config=config, draft_model=case.drafter)
    assert other.generate([PROMPT], 12)[0].tolist() == case.text[: len(PROMPT) + 12]
    assert made.draft is None


def test_a_norm_that_the_embedding_adds_is_left_out():
    class Normed(nn.Embedding):
        def __init__(self):
            super().__init__(9, 4)
            self.embed_norm = nn.LayerNorm(4)

        def forward(self, ids):
            return self.embed_norm(super().forward(ids))

    embedding, ids = Normed(), torch.tensor([[3, 5]])
    normed = embedding(ids)
    assert torch.equal(_unnormed(embedding)(ids), embedding.weight[ids])
    assert torch.equal(embedding(ids), normed)


def test_what_does_not_fit_is_refused(cases):
    dflash, mtp = cases("DFlash"), cases("three MTP layers")

    def refused(given, case, model, words):
        with pytest.raises(InputError, match=words):
            draft_from(given, case.engine.decoder, model)

    with pytest.raises(InputError, match=r"^draft_model=LlamaForCausalLM: give a transformed"):
        eepass.transform(dflash.model, draft_model=tiny_model())
    narrow = dflash_model()
    narrow.config.hidden_size = 32
    refused(narrow, dflash, dflash.model, "have 32 numbers, those of the model 64")
    refused(dflash.drafter, dflash, None, "transform that, not a transformed one")
    masked = dflash_model()
    masked.config.mask_token_id = VOCABULARY
    refused(masked, dflash, dflash.model, f"mask token is {VOCABULARY}, and .* has {VOCABULARY}")
    deep = dflash_model()
    deep.config.target_layer_ids = [0, 4]
    refused(deep, dflash, dflash.model, "after layer 5, and the model has 4")
    other = SimpleNamespace(num_embeddings=99)
    patched = mtp_model(mtp.model)
    del patched.embed_tokens
    object.__setattr__(patched, "embed_tokens", other)
    refused(patched, mtp, mtp.model, f"has 99 tokens, that of the model {VOCABULARY}")


def test_older_versions_are_named(cases, monkeypatch):
    case = cases("three MTP layers")
    monkeypatch.delattr(MtpModel, "forward_layer")
    with pytest.raises(InputError, match=r"^transformers \S+: its MtpModel has no forward_layer"):
        case.draft()


def test_recurrent_layers_are_refused(cases):
    case = cases("three MTP layers")
    config = transformers.Qwen3NextConfig(num_hidden_layers=1, layer_types=["linear_attention"])
    cache = DynamicCache(config=config)
    with pytest.raises(InputError, match="recurrent layers, whose states cannot be rolled back"):
        borrowed._of_whole_texts(cache, case.drafter)
