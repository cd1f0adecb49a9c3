"""Random draft trees and exits for a speculative step, and a plain model of what it does with them.

A tree hangs on the text alone, an exit on a row's text and the layer, so that the step and the
plain model ask for the same ones.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import torch
from models import VOCABULARY


class Script:
    """``tree(text)``: parents, tokens and whether there is a token, of ``count`` rows from 1 on.
    ``exit(text, layer)``: whether the row wants to exit, its token, and whether a draft token."""

    def __init__(self, plain, count, seed=0, right=0.8, often=0.6, least=0):
        self.plain, self.count, self.seed = plain, count, seed
        self.right, self.often, self.least = right, often, least

    def _token(self, text, chance):
        if chance.random() < self.right:
            return self.plain.next_token(list(text))
        return chance.randint(3, VOCABULARY - 1)

    def tree(self, text):
        chance = random.Random(hash((*text, self.seed)))
        parents, tokens, known, texts = [0], [text[-1]], [True], [tuple(text)]
        for row in range(1, self.count + 1):
            parents.append(chance.choice([row - 1, chance.randrange(row)]))
            tokens.append(self._token(texts[parents[row]], chance))
            known.append(chance.random() < 0.9)
            texts.append((*texts[parents[row]], tokens[row]))
        return parents[1:], tokens[1:], known[1:]

    def exit(self, text, layer):
        chance = random.Random(hash((*text, layer, self.seed, -1)))
        wants = chance.random() < self.often and layer >= self.least
        return wants, self._token(text, chance) if wants else 0, chance.random() < 0.9

    def draft(self, history, position, ids, parents, known, *, branches, first):
        """In place of ``text_drafts.draft``."""
        text = tuple(history[: int(position) + 1].tolist())
        for tensor, values in zip((parents, ids, known), self.tree(text), strict=True):
            tensor.copy_(torch.tensor(values))


class ScriptedTreeExits:
    """Exit points that do as a script says; ``step``: whose rows they are."""

    def __init__(self, script, layers, rows):
        self.plan = SimpleNamespace(draft_layer=1, draft_tokens=2)
        self.layers, self.tensors, self.script, self.rows = tuple(layers), {}, script, rows
        self.step = None

    def _scripted(self, layer):
        step = self.step
        before = tuple(step["history"][: int(step["root"])].tolist())
        ids, paths = step["ids"].tolist(), step["paths"].tolist()
        texts = [before + tuple(t for n, t in enumerate(ids) if path >> n & 1) for path in paths]
        return zip(*(self.script.exit(text, layer) for text in texts), strict=True)

    def draft(self, hidden):
        return torch.tensor([[7, 8]] * self.rows)

    def predict(self, layer, hidden, drafts, previous):
        self.layer = layer
        wants, _, _ = self._scripted(layer)
        return torch.tensor(wants), previous + 1, hidden.clone()

    def verify(self, z, drafts):
        _, tokens, known = self._scripted(self.layer)
        return torch.tensor(tokens), torch.tensor(known)


class PlainPasses:
    """Passes over a tree with exits in plain lists. ``pending``: how many tokens before the last
    have exited."""

    def __init__(self, script, text, layers, depth, most, exact, stop=(), limit=10**6):
        self.script, self.ids, self.layers, self.depth = script, list(text), sorted(layers), depth
        self.most, self.exact, self.stop, self.limit = most, exact, set(stop), limit
        self.pending, self.rollbacks, self.predictors = 0, 0, 0

    def step(self):
        """The tokens that are final by one more pass, and its exit layer."""
        root = len(self.ids) - 1 - self.pending
        self._grow(root)
        closed = self.exact and (self.ids[-1] in self.stop or len(self.ids) - 1 >= self.limit)
        layers = self.layers if self.pending < self.most and not closed else []
        self.next = {row: self.ids[root + row + 1] for row in range(self.pending)}
        exit_layer, room = self.depth, min(self.limit - root, self.most)
        for layer in layers:
            for row in self._live(room):
                if row in self.next:
                    continue
                self.predictors += 1
                wants, token, known = self.script.exit(self.texts[row], layer)
                if wants and known:
                    self.found[row] = token
            self.next |= self.found
            self.found.clear()
            if all(row in self.next for row in self._live(room)):
                exit_layer = layer
                break
        else:
            room = self.limit - root
            for row, text in enumerate(self.texts):
                if self.exact or row not in self.next:
                    self.next[row] = self.script.plain.next_token(list(text))
        path = max(map(self._path, self._live(room)), key=lambda path: (len(path), -path[-1]))
        tokens = [self.next[row] for row in path]
        given = 0 if self.exact else self.pending
        if exit_layer == self.depth:
            self.rollbacks += tokens[: self.pending] != self.ids[root + 1 :][: len(tokens)]
            self.pending = 0
        else:
            self.pending = len(path)
        self.ids[root + 1 :] = tokens
        return [] if self.exact and self.pending else tokens[given:], exit_layer

    def _grow(self, root):
        chain = self.ids[root:]
        parents, tokens, known = self.script.tree(tuple(self.ids))
        count, shift = self.script.count + 1, len(chain) - 1
        self.tokens = [*chain, *tokens][:count]
        self.parents = [*(max(n - 1, 0) for n in range(len(chain))), *(p + shift for p in parents)]
        self.known = [*[True] * len(chain), *known][:count]
        self.texts = [tuple(self.ids[:root]) + self._text(row) for row in range(count)]
        self.found = {}

    def _path(self, row):
        return [*self._path(self.parents[row]), row] if row else [0]

    def _text(self, row):
        return tuple(self.tokens[node] for node in self._path(row))

    def _leads(self, row):
        above = self.parents[row]
        if not self.known[row]:
            return False
        if above not in self.next:
            return True
        ends = self.next[above] in self.stop and above >= (0 if self.exact else self.pending)
        return self.next[above] == self.tokens[row] and not ends

    def _live(self, room):
        paths = [self._path(row) for row in range(len(self.tokens))]
        return [p[-1] for p in paths if len(p) <= room and all(map(self._leads, p[1:]))]
