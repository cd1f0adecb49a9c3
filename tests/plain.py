"""A reference for the engine, written plainly: no cache, no trees, no catch-up."""

from __future__ import annotations

import random
from types import SimpleNamespace

import torch
from models import VOCABULARY

from eepass.runtime.drafting.budget import Budget
from eepass.runtime.drafting.tree import Tree
from eepass.runtime.exits.exits import ExitDecision, RowState


class PlainEngine:
    """Dense greedy decoding by running the whole text anew for every token."""

    def __init__(self, model):
        self.model = model
        self.known = {}

    def next_token(self, ids):
        key = tuple(ids)
        if key not in self.known:
            logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            self.known[key] = int(logits.argmax())
        return self.known[key]

    def answer(self, ids, count, stop=frozenset()):
        generated = []
        while len(generated) < count and not (generated and generated[-1] in stop):
            generated.append(self.next_token([*ids, *generated]))
        return generated


class RandomDraft:
    """Random trees; a token is the one of the plain engine with probability ``right``."""

    feature_layers = None
    expected, calls = 1.5, 1.0

    def __init__(self, plain, seed, right=0.5, most=7):
        self.plain, self.right, self.most = plain, right, most
        self.random = random.Random(seed)
        self.tokens = []

    def follow(self, tokens):
        self.tokens += tokens

    def propose(self, root, budget: Budget, read):
        assert self.tokens[-1] == root
        tree = Tree([root])
        # more than fit into a pass as well: the engine must not rely on a draft
        for _ in range(self.random.randint(0, self.most)):
            parent = self.random.randrange(len(tree))
            path = [tree.tokens[node] for node in tree.path(parent)]
            if self.random.random() < self.right:
                token = self.plain.next_token([*self.tokens, *path])
            else:
                token = self.random.randint(3, VOCABULARY - 1)
            tree.add(token, parent, self.random.random(), (0, 0))
        return tree

    def truncate(self, length):
        del self.tokens[length:]

    def call_seconds(self):
        return 0.0

    def fresh(self):
        return RandomDraft(self.plain, self.random.random(), self.right, self.most)


class RandomExits:
    """Exits at random rows and layers; their token is right with probability ``right``."""

    def __init__(self, engine_of, plain, num_layers, seed, often=0.4, right=0.6):
        self.thresholds = dict.fromkeys(range(1, num_layers + 1), 0.5)
        self.plan = SimpleNamespace(draft_layer=-1)
        self.engine_of, self.plain = engine_of, plain
        self.random, self.often, self.right = random.Random(seed), often, right

    def prepare(self, most):
        """Nothing is compiled."""

    def begin(self, rows, drafts=None):
        return RowState(torch.zeros(rows, 1, dtype=torch.long), torch.zeros(rows, 1))

    def final(self, hidden):
        return hidden

    def check(self, layer, hidden, state, evaluated, statistics, choose):
        texts = self.engine_of().current_texts()
        tokens = {}
        for row in evaluated:
            if self.random.random() < self.often:
                if self.random.random() < self.right:
                    tokens[row] = self.plain.next_token(texts[row])
                else:
                    tokens[row] = self.random.randint(3, VOCABULARY - 1)
        return ExitDecision(tokens, {row: hidden[0, row] for row in tokens}), state
