"""The trained draft head's levels within a speculative step: the trees that the host would grow,
and answers that are the exact engine's, whatever the head says."""

from collections import Counter, defaultdict
from functools import partial
from itertools import pairwise

import pytest
import torch
from models import VOCABULARY, eager_compile
from steps import LateFlags, LateResultQueue

from eepass.passes.pipeline import split_for_rows
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.drafting.eagle_head import WIDTH, EagleHead
from eepass.runtime.drafting.eagle_layer import HeadStyle
from eepass.runtime.drafting.tree import Tree
from eepass.runtime.engine.engine import Engine
from eepass.runtime.sampling import Sampling
from eepass.runtime.step.build_speculative import build_speculative_step
from eepass.runtime.step.data import check_step
from eepass.runtime.step.head_drafts import HeadDrafts
from eepass.runtime.step.host import Flags, HostDriven, called
from eepass.runtime.step.interpret import Interpreter
from eepass.runtime.step.speculative_engine import SpeculativeEngine
from eepass.runtime.step.tree_shape import TreeShape

FEATURE_LAYERS = (0, 2)
ROTARY = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
SHAPES = {"head": TreeShape(named=15, levels=3), "head and text": TreeShape((5,), 10, 3)}


@pytest.fixture(scope="module")
def decoder(llama):
    with torch.no_grad():
        return Decoder(split_for_rows(llama, 176, (1, 2, 4, 8, 16), 32)[0], eager_compile)


def made_head(decoder, follows=(), seed=0):
    """A random head, or one that names what ``follows`` each token, from its feature z alone."""
    generator = torch.Generator().manual_seed(seed)
    hidden = decoder.hidden_size
    style = HeadStyle(hidden, 4, 2, ROTARY, 128, 1 + len(FEATURE_LAYERS))
    tensors = {
        f"eagle.{name}": torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        if len(shape) > 1 else torch.rand(shape, generator=generator) + 0.5
        for name, shape in style.shapes().items()
    }  # fmt: skip
    tensors |= {"eagle.rotary": ROTARY, "eagle.features": torch.tensor(FEATURE_LAYERS)}
    tensors["eagle.hot.ids"] = torch.arange(0, VOCABULARY, 2)
    tensors["eagle.hot.head"] = torch.randn(VOCABULARY // 2, hidden, generator=generator) / 4
    if follows:
        for name in ("fc", "o", "down"):
            tensors[f"eagle.{name}"].zero_()
        tensors["eagle.fc"][:, :hidden] = torch.eye(hidden)
        for name in ("fc_norm", "hidden_norm", "norm"):
            tensors[f"eagle.{name}"].fill_(1)
        # z is most like the row of the LM head of the token it stands before
        rows = decoder.tensors[decoder.splits[1].head.weight]
        tensors["eagle.hot.ids"] = torch.tensor([t for _, *named in follows for t in named])
        scaled = [row for token, *_ in follows for row in (1.2 * rows[token], rows[token])]
        tensors["eagle.hot.head"] = torch.stack(scaled)
    embedding = torch.randn(VOCABULARY, hidden, generator=generator) / 4
    return EagleHead(tensors, embedding, eager_compile)


def bigrams(answers):
    """For each token what is named after it: first another token, then what mostly follows."""
    found = defaultdict(Counter)
    for answer in answers:
        for token, following in pairwise(answer):
            found[token][following] += 1
    named = {token: counts.most_common(1)[0][0] for token, counts in found.items()}
    return tuple((token, (right + 1) % VOCABULARY, right) for token, right in named.items())


def drafts_of(decoder, follows=()):
    norm = partial(decoder.splits[1].head.normed, tensors=decoder.tensors)
    return HeadDrafts(made_head(decoder, follows), norm, eager_compile)


def engine_over(decoder, shape, how="host", draws=False, stop=(), follows=()):
    head = drafts_of(decoder, follows) if shape.named else None
    step = build_speculative_step(decoder, shape, stop, draws, head=head)
    check_step(step)
    if how == "interpret":
        executor = Interpreter(step)
    else:
        flags = LateFlags(step.flags) if how == "late" else Flags()
        executor = HostDriven(step, flags, called(step))
    return SpeculativeEngine(decoder, step, executor, LateResultQueue(step["out"]), head=head)


def prompts(count, seed=5):
    generator = torch.Generator().manual_seed(seed)
    for length in range(1, count + 1):
        yield torch.randint(0, VOCABULARY, (1 + length % 30,), generator=generator).tolist()


def tokens_of(engine, prompt, count, **options):
    return [step.token for step in engine.generate(prompt, count, **options)]


def likeliest(levels, root, count):
    """The ``count`` likeliest nodes of a tree of whole ``levels``, as a set of paths."""
    tree, nodes, joint = Tree([root]), [0], [0.0]
    for level in levels:
        above = [place for place in level.above for _ in range(WIDTH)]
        joint_above, nodes_above = joint, nodes
        joint = [joint_above[a] + min(s, 0.0) for a, s in zip(above, level.scores, strict=True)]
        nodes = []
        for place, token in enumerate(level.tokens):
            tree.tokens.append(token)
            tree.parents.append(nodes_above[above[place]])
            tree.chances.append(joint[place])
            nodes.append(len(tree) - 1)
    order = sorted(range(1, len(tree)), key=lambda node: -tree.chances[node])[:count]
    return {tuple(tree.tokens[n] for n in tree.path(node)) for node in order}


@pytest.mark.parametrize("confirmed", (1, 2, 4))
def test_the_tree_is_the_likeliest_of_the_levels_the_host_would_grow(decoder, confirmed):
    ours, host = drafts_of(decoder), made_head(decoder)
    generator = torch.Generator().manual_seed(confirmed)
    text = torch.randint(0, VOCABULARY, (30,), generator=generator).tolist()
    features = torch.randn(30, host.feature_size, generator=generator)
    begin = 30 - confirmed
    for head in (ours.head, host):
        head.extend(text[:begin], features[:begin])
    shape = TreeShape(named=15, levels=3)
    tokens, given = torch.zeros(4, dtype=torch.long), torch.zeros(4, host.feature_size)
    tokens[:confirmed], given[:confirmed] = torch.tensor(text[begin:]), features[begin:]
    ids, parents = ours.levels(shape, 4)(
        tokens, given, torch.tensor([begin]), torch.tensor([confirmed]), *ours.state().values()
    )
    tree = Tree([text[-1], *ids.tolist()], [-1, *parents.tolist()])
    assert all(parent <= row for row, parent in enumerate(parents.tolist()))
    found = {tuple(tree.tokens[n] for n in tree.path(node)) for node in range(1, len(tree))}
    levels = host.begin(text[begin:], features[begin:], levels=3)
    assert found == likeliest(levels, text[-1], 15) and len(found) == 15
    assert max(map(len, found)) > 1


@pytest.fixture(scope="module")
def answers(decoder):
    """The exact engine's, with their prompts."""
    engine = Engine(decoder)
    return [(prompt, tokens_of(engine, prompt, 60)) for prompt in prompts(9)]


@pytest.mark.parametrize("how", ("interpret", "host", "late"))
@pytest.mark.parametrize("shape", SHAPES)
def test_answers_are_the_exact_engines_in_fewer_passes(decoder, answers, shape, how):
    follows = bigrams(tokens for _, tokens in answers)
    engine, apart = engine_over(decoder, SHAPES[shape], how, follows=follows), 0
    for prompt, expected in answers[:3]:
        tokens = engine.generate(prompt, 60)
        for token in expected:
            assert next(tokens).token == token
            apart += engine.step["moved"].item()
    found = engine.statistics
    assert found.tokens >= 177 and found.passes < 0.7 * found.tokens
    # what the head names second is right: its keys and values move
    assert apart


def test_three_hundred_passes_give_the_exact_engines_tokens(decoder):
    """A head that is nearly always wrong; in the interpreter, every launch checked."""
    engine, shape = Engine(decoder), SHAPES["head"]
    steps, passes = engine_over(decoder, shape, "interpret"), 0
    for prompt in prompts(9, seed=8):
        count = 100 - len(prompt)
        assert tokens_of(steps, prompt, count) == tokens_of(engine, prompt, count)
        passes = steps.statistics.passes
        if passes > 300:
            break
    assert passes > 300


def test_sampled_tokens_are_those_of_one_row_a_pass(decoder, answers):
    follows = bigrams(tokens for _, tokens in answers)
    ours = engine_over(decoder, SHAPES["head and text"], draws=True, follows=follows)
    one = engine_over(decoder, TreeShape(), draws=True)
    sampling = Sampling(temperature=0.4, top_p=0.9, seed=3)
    for prompt, _ in answers[:2]:
        expected = tokens_of(one, prompt, 40, sampling=sampling)
        assert tokens_of(ours, prompt, 40, sampling=sampling) == expected
    assert ours.statistics.passes < one.statistics.passes


def test_a_prompt_longer_than_a_window_is_run_by_the_head_from_there(decoder, monkeypatch):
    monkeypatch.setattr("eepass.runtime.step.head_drafts.WINDOW", 20)
    drafts, host = drafts_of(decoder), made_head(decoder)
    tokens = list(range(50))
    features = torch.randn(50, host.feature_size)
    drafts.follow(tokens[:24], features[:24], 26)
    last = drafts.follow(tokens[24:], features[24:], 0)
    normed = features.clone()
    size = decoder.hidden_size
    normed[:, :size] = drafts.norm(features[None, :, :size])[0]
    assert torch.equal(last, normed[-1:]) and drafts.head.length == 50
    host.skip(30)
    host.extend(tokens[30:], normed[29:49])
    for mine, other in zip(drafts.head.memory[0], host.memory[0], strict=True):
        assert torch.equal(mine, other)
