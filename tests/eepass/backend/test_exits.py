"""``torch.compile(backend="specee")``: exits, and the caller's cache."""

import copy
import logging
import threading

import pytest
import torch
from caller import (
    COUNT,
    DEPTH,
    IDS,
    OTHER,
    Seen,
    answer,
    artifact_of,
    cache_for,
    compiled,
    decode,
    generate,
    prefill,
)
from models import random_artifact, tiny_model
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

from eepass.errors import InputError
from eepass.torch_compile import backend


def same_caches(a, b, slots, atol=1e-4):
    for ours, theirs in zip(a.layers, b.layers, strict=True):
        for name in ("keys", "values"):
            x, y = getattr(ours, name)[:, :, :slots], getattr(theirs, name)[:, :, :slots]
            torch.testing.assert_close(x, y, atol=atol, rtol=1e-3)


@pytest.mark.parametrize("family", ("llama", "gpt2", "gpt_neox", "mixtral"))
def test_without_exits_it_is_the_eager_model_cache_included(family, tmp_path):
    torch._dynamo.reset()
    model, seen = tiny_model(family), Seen()
    random_artifact(model).save(tmp_path / "a")
    step = compiled(model, tmp_path / "a", threshold=1.0, stats=seen)
    ours, theirs = cache_for(model), cache_for(model)
    logits = prefill(model, ours, IDS)
    prefill(model, theirs, IDS)
    for place in range(4):
        token = logits.argmax(-1, keepdim=True)
        if family == "llama":
            # positions and masks from the cache's own length
            logits = step(input_ids=token, past_key_values=ours).logits[:, -1]
            expected = model(input_ids=token, past_key_values=theirs).logits[:, -1]
        else:
            logits = decode(step, ours, token, 6 + place)
            expected = decode(model, theirs, token, 6 + place)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert seen.layers == [4] * 4
    same_caches(ours, theirs, None, atol=1e-5)
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert int(a.cumulative_length) == int(b.cumulative_length)


def test_logits_after_an_exit_are_those_of_the_hidden_state_there(model, folder):
    torch._dynamo.reset()
    seen = Seen()
    step = compiled(model, folder, threshold=0.4, stats=seen)
    cache = cache_for(model)
    steps = list(answer(model, step, cache, IDS, COUNT))
    tokens = torch.cat([IDS, *(token for token, _ in steps)], 1)
    # each token's states as they are with all before it gone through all layers
    states = model(tokens, output_hidden_states=True).hidden_states
    artifact = artifact_of(model)
    assert len(set(seen.layers)) > 2
    for place, layer in enumerate(seen.layers):
        hidden = states[layer][:, 6 + place]
        if layer < DEPTH:
            parts = [artifact.tensors[f"translator.{layer}.{n}"] for n in ("scale", "down", "up")]
            hidden = model.model.norm(torch.ops.eepass.translate(hidden, *parts))
        expected = model.lm_head(hidden)
        torch.testing.assert_close(steps[place + 1][1], expected, atol=1e-3, rtol=1e-3)
    dense = cache_for(model)
    prefill(model, dense, tokens)
    last_whole = max(place for place, layer in enumerate(seen.layers) if layer == DEPTH)
    same_caches(cache, dense, 6 + last_whole + 1)
    # pending tokens have keys and values, if not yet the true ones
    end = 6 + len(seen.layers)
    for layer in cache.layers:
        assert layer.keys[:, :, :end].abs().sum((1, 3)).gt(0).all()


def test_propagated_keys_are_projected_from_the_hidden_state_at_the_exit(model, folder):
    torch._dynamo.reset()
    seen = Seen()
    step = compiled(model, folder, threshold=0.0, kv="propagate", stats=seen)
    cache = cache_for(model)
    token = prefill(model, cache, IDS).argmax(-1, keepdim=True)
    decode(step, cache, token, 6)
    (layer,) = seen.layers
    assert layer < DEPTH
    states = model(torch.cat([IDS, token], 1), output_hidden_states=True).hidden_states
    hidden = states[layer][:, 6]
    for index in range(layer, DEPTH):
        block = model.model.layers[index]
        value = block.self_attn.v_proj(block.input_layernorm(hidden)).view(1, 2, 16)
        torch.testing.assert_close(cache.layers[index].values[:, :, 6], value, atol=1e-4, rtol=1e-3)


def test_interleaved_sequences_do_not_change_one_another(model, exits):
    step, alone = exits
    runs = [answer(model, step, cache_for(model), ids, COUNT) for ids in (IDS, OTHER)]
    tokens = [
        [int(token) for token, _ in pair] for pair in zip(*zip(*runs, strict=True), strict=True)
    ]
    assert tokens == [alone[IDS], alone[OTHER]]


def test_threads_do_not_change_one_another(model, exits):
    step, alone = exits
    found = {}

    def run(number, ids):
        with torch.no_grad():
            found[number] = generate(model, step, ids, COUNT)[0]

    threads = [threading.Thread(target=run, args=(n, (IDS, OTHER)[n % 2])) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(4)] == [alone[IDS], alone[OTHER]] * 2


def test_a_reset_cache_remembers_nothing(model, exits):
    step, alone = exits
    cache = cache_for(model)
    for ids in (IDS, OTHER, OTHER, IDS):
        assert generate(model, step, ids, COUNT, cache)[0] == alone[ids]
        cache.reset()


def test_a_cropped_cache_decodes_as_a_new_one(model, exits):
    step, alone = exits
    cache = cache_for(model)
    generate(model, step, IDS, COUNT, cache)
    for layer in cache.layers:
        layer.cumulative_length.fill_(0)
    assert generate(model, step, OTHER, COUNT, cache)[0] == alone[OTHER]


def one_by_hand(model, cache, token, position):
    decode(model, cache, token, position)
    return position + 1


def reordered(model, cache, token, position):
    cache.reorder_cache(torch.tensor([0]))
    return position


def cut_by_two(model, cache, token, position):
    for layer in cache.layers:
        layer.cumulative_length.sub_(2)
    return position - 2


@pytest.mark.parametrize("change", (one_by_hand, reordered, cut_by_two))
def test_what_was_remembered_ends_where_others_write(model, exits, change):
    step, _ = exits
    cache = cache_for(model)
    token = [t for t, _ in answer(model, step, cache, IDS, 9)][-1]
    position = change(model, cache, token, 6 + 8)
    # nobody knows anything of a copy
    unknown = copy.deepcopy(cache)
    for place in range(position, position + 6):
        ours, theirs = decode(step, cache, token, place), decode(step, unknown, token, place)
        torch.testing.assert_close(ours, theirs, atol=0.0, rtol=0.0)
        token = ours.argmax(-1, keepdim=True)


def test_a_full_cache_is_refused_and_nothing_is_written(model, exits):
    """Compiled code does not check bounds: past the last slot is other memory."""
    step, cache = exits[0], cache_for(model, IDS.shape[1] + 2)
    assert len(generate(model, step, IDS, 3, cache)[0]) == 3
    kept = [layer.keys.clone() for layer in cache.layers]
    with pytest.raises(InputError, match="full at 8 tokens: make it longer"):
        decode(step, cache, torch.tensor([[5]]), IDS.shape[1] + 2)
    for before, layer in zip(kept, cache.layers, strict=True):
        assert torch.equal(before, layer.keys) and int(layer.cumulative_length) == 8


def test_inference_mode_is_deterministic(model, folder):
    torch._dynamo.reset()
    with torch.inference_mode():
        step = compiled(model, folder, threshold=0.4)
        first, again = (generate(model, step, IDS, COUNT) for _ in range(2))
    assert first == again


def test_recompiles_do_not_grow_with_tokens(model, folder):
    torch._dynamo.reset()
    counters.clear()
    step = compiled(model, folder, threshold=0.4)
    generate(model, step, IDS, 6)
    graphs = counters["stats"]["unique_graphs"]
    generate(model, step, OTHER, 24)
    assert counters["stats"]["unique_graphs"] == graphs == 1
    # another length is one more graph, and then any length is
    for length in (40, 48, 56):
        generate(model, step, IDS, 4, cache_for(model, length))
    assert counters["stats"]["unique_graphs"] == 2


def test_rows_of_a_batch_exit_together(model, folder):
    torch._dynamo.reset()
    seen = Seen()
    step = compiled(model, folder, threshold=0.4, kv="propagate", stats=seen)
    (single,) = generate(model, step, IDS, COUNT)
    left = list(seen.layers)
    assert min(left) < DEPTH
    twice = generate(model, step, IDS.expand(2, -1), COUNT)
    assert twice == [single, single]
    seen.layers.clear()
    assert len(generate(model, step, torch.cat([IDS, OTHER]), COUNT)) == 2


def test_a_batch_whose_rows_disagree_is_dense(model, folder):
    torch._dynamo.reset()
    step = compiled(model, folder, threshold=1.0)
    ids = torch.cat([IDS, OTHER])
    assert generate(model, step, ids, COUNT) == generate(model, model, ids, COUNT)


def test_hot_logits_skip_the_full_head(model, folder):
    torch._dynamo.reset()
    seen = Seen()
    step = compiled(model, folder, threshold=0.4, logits="hot", stats=seen)
    hot = artifact_of(model).tensors["hot.ids"].long()
    found = list(answer(model, step, cache_for(model), IDS, COUNT))[1:]
    cold = torch.ones(160, dtype=torch.bool)
    cold[hot] = False
    skipped = [bool((logits[0, cold] == -torch.inf).all()) for _, logits in found]
    assert any(skipped)
    assert seen.full_heads == skipped.count(False)
    assert all(logits[0, hot].isfinite().all() for _, logits in found)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"guarantee": "exact"}, "custom_generate=eepass.generate"),
        ({"tresholds": 0.5}, "known: artifact, preset, guarantee"),
        ({"threshold": 2.0}, "between 0 and 1"),
        ({"target_agreement": 0.9999}, "calibrated up to 0.98"),
        ({"draft": "eagle"}, "must be lens"),
        ({"preset": "fast"}, "must be one of default, paper"),
        ({"kv": "drop"}, "must be one of defer, propagate"),
        ({"logits": "some"}, "must be one of full, hot"),
        ({"stats": 3}, "must be a function"),
        ({"artifact": "/nowhere"}, "no artefact here"),
        ({"inner_backend": "inducer"}, "inducer"),
    ),
)
def test_options_that_do_not_fit_are_errors(model, folder, options, message):
    torch._dynamo.reset()
    step = compiled(model, options.pop("artifact", folder), **options)
    with pytest.raises(BackendCompilerFailed, match=message):
        generate(model, step, IDS, 3)


def test_an_artefact_of_another_model_is_refused(model, folder):
    torch._dynamo.reset()
    other = tiny_model("llama", num_hidden_layers=DEPTH)
    other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(BackendCompilerFailed, match="trained for another model"):
        generate(other, compiled(other, folder), IDS, 3)


def test_the_artefact_beside_a_checkpoint_is_found(model, tmp_path, caplog):
    from transformers import AutoModelForCausalLM

    model.save_pretrained(tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    seen = Seen()
    options = {"inner_backend": "eager", "stats": seen}
    step = torch.compile(loaded, backend=backend.specee, options=options)
    torch._dynamo.reset()
    with caplog.at_level(logging.WARNING, "eepass"):
        dense = generate(loaded, step, IDS, COUNT)
        generate(loaded, step, OTHER, COUNT)
    assert dense == generate(model, model, IDS, COUNT)
    assert [r.message for r in caplog.records if "no artefact" in r.message] != []
    assert len(caplog.records) == 1
    # in layers all the same: ours are faster than a graph that is compiled whole
    assert seen.layers and set(seen.layers) == {DEPTH}

    artifact_of(model).save(tmp_path / "m" / "eepass")
    torch._dynamo.reset()
    seen = Seen()
    options = {"inner_backend": "eager", "threshold": 0.4, "stats": seen}
    step = torch.compile(loaded, backend=backend.specee, options=options)
    generate(loaded, step, IDS, COUNT)
    assert min(seen.layers) < DEPTH


def test_gradients_and_training_are_the_dense_models(model, folder):
    torch._dynamo.reset()
    ours, theirs = copy.deepcopy(model).requires_grad_(True), copy.deepcopy(model)
    theirs.requires_grad_(True)
    step = compiled(ours, folder, threshold=0.0)
    with torch.enable_grad():
        step(IDS, labels=IDS, use_cache=False).loss.backward()
        theirs(IDS, labels=IDS, use_cache=False).loss.backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)
    ours.train()
    assert generate(ours, step, IDS, 6) == generate(model, model, IDS, 6)


def test_a_graph_break_inside_a_layer_is_dense(model, folder):
    torch._dynamo.reset()
    broken, seen = copy.deepcopy(model), Seen()
    forward = broken.model.layers[3].mlp.forward

    def breaking(x):
        torch._dynamo.graph_break()
        return forward(x)

    broken.model.layers[3].mlp.forward = breaking
    step = compiled(broken, folder, threshold=0.0, stats=seen)
    assert generate(broken, step, IDS, 6) == generate(model, model, IDS, 6)
    assert not seen.layers


def test_a_cache_that_grows_is_dense(model, folder):
    from transformers import DynamicCache

    torch._dynamo.reset()
    step = compiled(model, folder, threshold=0.0)
    ours, theirs = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for ids in (IDS, torch.tensor([[9]]), torch.tensor([[12]])):
        logits = step(ids, past_key_values=ours).logits
        torch.testing.assert_close(
            logits, model(ids, past_key_values=theirs).logits, atol=1e-4, rtol=1e-4
        )


def test_what_is_no_decode_step_is_dense(model, folder):
    torch._dynamo.reset()
    step = compiled(model, folder, threshold=0.0)
    torch.testing.assert_close(step(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)
    ours, theirs = cache_for(model), cache_for(model)
    found = step(IDS, past_key_values=ours).logits
    torch.testing.assert_close(found, prefill_all(model, theirs), atol=1e-4, rtol=1e-4)
    same_caches(ours, theirs, 6)
    wanted = step(IDS[:, :1], past_key_values=ours, output_hidden_states=True)
    assert len(wanted.hidden_states) == DEPTH + 1


def prefill_all(model, cache):
    return model(IDS, past_key_values=cache).logits
