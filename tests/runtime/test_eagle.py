"""The draft head at run time says what it says in training."""

import torch
from models import VOCABULARY, eager_compile

from eepass.runtime import eagle
from eepass.training.draft_head import draft_states


def test_one_by_one_equals_the_whole_answer_at_once():
    torch.manual_seed(0)
    weights = {
        name: torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 1)
        for name, shape in eagle.shapes(64).items()
    }
    embedding = torch.randn(VOCABULARY, 64)
    tensors = {f"eagle.{name}": weight for name, weight in weights.items()}
    tensors["hot.ids"] = torch.arange(0, VOCABULARY, 2)
    tensors["hot.head"] = embedding[tensors["hot.ids"]]
    draft = eagle.EagleDraft(tensors, embedding, 5, eager_compile)
    token, z = torch.randint(0, VOCABULARY, (12,)), torch.randn(12, 64)
    states = draft_states(weights, token, z, torch.arange(12), embedding)
    expected = tensors["hot.ids"][(states @ tensors["hot.head"].T).topk(5, -1).indices]
    for _ in range(2):  # and once more after a reset
        before = torch.zeros(1, 1, 64)
        for place in range(12):
            found = draft.propose(int(token[place]), before, place)
            assert torch.equal(found, expected[place : place + 1])
            before = z[None, place : place + 1]
        draft.reset()
