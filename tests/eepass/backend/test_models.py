"""``torch.compile(backend="specee")``: whose weights they are, and where the model is found."""

import copy
import logging

import pytest
import torch
from caller import COUNT, DEPTH, IDS, LENGTH, Seen, cache_for, compiled, generate
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from transformers.modeling_outputs import CausalLMOutputWithPast

from eepass.torch_compile import backend


def test_weights_changed_after_compile(model, folder, caplog):
    torch._dynamo.reset()
    changed, seen = copy.deepcopy(model), Seen()
    step = compiled(changed, folder, threshold=0.4, stats=seen)
    generate(changed, step, IDS, COUNT)
    assert min(seen.layers) < DEPTH
    seen.layers.clear()
    for layer in changed.model.layers:
        layer.mlp.down_proj.weight.mul_(0.5)
    with caplog.at_level(logging.WARNING, "eepass"):
        assert generate(changed, step, IDS, COUNT) == generate(changed, changed, IDS, COUNT)
    assert set(seen.layers) == {DEPTH}
    assert "weights were changed" in caplog.text
    # the same weights elsewhere in memory are the same weights
    for mine, theirs in zip(changed.parameters(), model.parameters(), strict=True):
        mine.data = theirs.data.clone()
    seen.layers.clear()
    generate(changed, step, IDS, COUNT)
    assert min(seen.layers) < DEPTH


def test_another_model_of_the_class_brings_its_own_weights(model, folder):
    """Dynamo reuses a graph for any model it fits; exits belong to one."""
    torch._dynamo.reset()
    other = copy.deepcopy(model)
    other.model.norm.weight.mul_(-1.0)
    seen = Seen()

    def call(model, **inputs):
        return model(**inputs)

    options = {"artifact": str(folder), "inner_backend": "eager", "threshold": 0.4, "stats": seen}
    step = torch.compile(call, backend=backend.specee, options=options)
    generate(model, lambda **inputs: step(model, **inputs), IDS, COUNT)
    assert min(seen.layers) < DEPTH
    seen.layers.clear()
    try:
        tokens = generate(other, lambda **inputs: step(other, **inputs), IDS, COUNT)
    except BackendCompilerFailed as error:
        assert "another model" in str(error)
    else:
        assert tokens == generate(other, other, IDS, COUNT)


def function_with_a_closure(model):
    def run(**inputs):
        return model(**inputs)

    return run


def function_of_a_global(model):
    globals()["SERVED"] = model
    return run_global


def run_global(**inputs):
    return SERVED(**inputs)  # noqa: F821  set by function_of_a_global


def method_of_an_object(model):
    class Server:
        def __init__(self):
            self.model = model

        def run(self, **inputs):
            return self.model(**inputs)

    return Server().run


def function_of_a_compiled_model(model):
    inner = torch.compile(model, backend="eager")

    def run(**inputs):
        return inner(**inputs)

    return run


class Wrapper(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, **inputs):
        return self.inner(**inputs)


@pytest.mark.parametrize(
    "held",
    (
        function_with_a_closure,
        function_of_a_global,
        method_of_an_object,
        Wrapper,
        function_of_a_compiled_model,
    ),
)
def test_the_model_is_found_wherever_the_compiled_function_has_it(model, folder, held):
    torch._dynamo.reset()
    seen = Seen()
    generate(model, compiled(held(model), folder, threshold=0.4, stats=seen), IDS, 8)
    assert seen.layers and min(seen.layers) < DEPTH


@pytest.mark.parametrize("length", (LENGTH, LENGTH + 16))
def test_a_copy_of_the_model_exits_through_the_same_graph(model, exits, folder, length):
    """The copy's weights are other tensors: its artefact is found through the frame that calls."""
    torch._dynamo.reset()
    counters.clear()
    seen, other = Seen(), copy.deepcopy(model)

    def call(model, **inputs):
        return model(**inputs)

    step = compiled(call, folder, threshold=0.4, stats=seen)
    for _ in range(2):
        # another length of cache makes one more graph, for all further lengths
        generate(
            model, lambda **inputs: step(model, **inputs), IDS, 3, cache_for(model, length - 8)
        )
        generate(
            model, lambda **inputs: step(model, **inputs), IDS, 3, cache_for(model, length - 4)
        )
    graphs = counters["stats"]["unique_graphs"]
    seen.layers.clear()
    cache = cache_for(other, length)
    found = generate(other, lambda **inputs: step(other, **inputs), IDS, COUNT, cache)
    assert counters["stats"]["unique_graphs"] == graphs
    assert min(seen.layers) < DEPTH and found == [exits[1][IDS]]


def test_a_model_that_is_not_of_hugging_face_is_dense_with_the_reason(model, folder, caplog):
    class Foreign(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = model.model, model.lm_head

        def forward(self, **inputs):
            hidden = self.body(**inputs).last_hidden_state
            return CausalLMOutputWithPast(logits=self.head(hidden))

    torch._dynamo.reset()
    seen = Seen()
    step = compiled(Foreign(), folder, threshold=0.0, stats=seen)
    with caplog.at_level(logging.WARNING, "eepass"):
        assert generate(model, step, IDS, 6) == generate(model, model, IDS, 6)
    assert "decodes dense: no Hugging Face model" in caplog.text
    assert not seen.layers
