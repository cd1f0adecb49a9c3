"""Training the draft head: it learns, resumes, stops, and goes on from another."""

import pytest
import torch
from safetensors.torch import load_file

from eepass.errors import InputError
from eepass.runtime.drafting.eagle_layer import HeadStyle
from eepass.training import draft_head
from eepass.training.draft_head import fit_draft_head, refuse_other_head
from eepass.training.muon import Muon, orthogonal
from eepass.training.unrolling import Lines, draft_hits

STYLE = HeadStyle(64, 4, 2, 10000.0 ** -torch.arange(0, 1, 1 / 8), 192, 2)


def made_lines(embedding, lines=60, length=12):
    """Lines in which each token says the next, and z says the one after it."""
    order = torch.randperm(len(embedding), generator=torch.Generator().manual_seed(1))
    follows = torch.empty_like(order)
    follows[order] = order.roll(-1)
    token = torch.randint(0, len(embedding), (lines, length))
    for place in range(1, length):
        token[:, place] = follows[token[:, place - 1]]
    token = token.flatten()
    z, noise = 4 * embedding[follows[token]], torch.randn(len(token), embedding.shape[1])
    place = torch.arange(length).repeat(lines)
    return Lines(token, torch.cat([z, noise], -1), place), follows[token]


def test_a_draft_head_learns_to_follow_its_own_drafts(monkeypatch):
    monkeypatch.setattr(draft_head, "BATCH_ROWS", 128)
    torch.manual_seed(0)
    embedding = torch.nn.functional.normalize(torch.randn(40, 64), dim=-1) * 3
    lines, label = made_lines(embedding)
    hot = torch.arange(40)
    fitted = fit_draft_head(lines, embedding, embedding, STYLE, lambda n: None, 3, 10)
    hits = draft_hits(fitted, lines, label, embedding, hot, embedding, 3)
    assert [hit["top1"] > 0.9 for hit in hits] == [True] * 3
    assert all(hit["top4"] >= hit["top1"] for hit in hits)


def test_a_head_is_trained_further(monkeypatch):
    """A pass over other lines leaves it better than a new head."""
    monkeypatch.setattr(draft_head, "BATCH_ROWS", 128)
    torch.manual_seed(0)
    embedding = torch.nn.functional.normalize(torch.randn(40, 64), dim=-1) * 3
    hot = torch.arange(40)

    def hits_after(passes, start=None):
        lines, label = made_lines(embedding)
        head = fit_draft_head(
            lines, embedding, embedding, STYLE, lambda n: None, 2, passes, start=start
        )
        return head, draft_hits(head, lines, label, embedding, hot, embedding, 1)[0]["top1"]

    first, _ = hits_after(8)
    before = {name: tensor.clone() for name, tensor in first.items()}
    assert hits_after(1, first)[1] > 0.9 > hits_after(1)[1]
    assert all(torch.equal(first[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda head: head.clear(), "no draft head"),
        (
            lambda head: head.update(features=torch.tensor([1, 3])),
            "after layers 1, 3, and",
        ),
        (lambda head: head.update(o=torch.zeros(2, 2)), r"no tensor o of \(64, 64\)"),
        (lambda head: head.update(epsilon=torch.tensor(1e-6)), "another form"),
    ],
)
def test_a_head_of_another_form_is_not_trained_further(change, message):
    head = {name: torch.zeros(shape) for name, shape in STYLE.shapes().items()}
    head["features"] = torch.tensor([2])
    refuse_other_head(head, STYLE, [2])
    change(head)
    with pytest.raises(InputError, match=message):
        refuse_other_head(head, STYLE, [2])


@pytest.mark.parametrize("shape", ((24, 40), (40, 24)))
def test_muon_does_what_torchs_does(shape):
    """In float32, where torch's own rounds to bfloat16."""
    torch.manual_seed(0)
    began = torch.randn(shape)
    values = torch.linalg.svdvals(orthogonal(began))
    assert values.min() > 0.5 and values.max() < 1.4
    ours, theirs = (began.clone().requires_grad_() for _ in range(2))
    optimizers = Muon([ours], 0.02), torch.optim.Muon([theirs], 0.02, weight_decay=0.02)
    for _ in range(5):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert (ours - theirs).abs().max() < 0.02 * (ours - began).abs().max()


def test_a_draft_head_is_taken_up_where_its_last_pass_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(draft_head, "BATCH_ROWS", 128)
    torch.manual_seed(0)
    embedding = torch.randn(40, 64)
    lines, _ = made_lines(embedding, lines=12)
    whole = fit_draft_head(lines, embedding, embedding, STYLE, lambda n: None, 2, 3)
    seen = []

    def stop_in_the_second_pass(amount):
        seen.append(amount)
        if sum(seen) > len(lines.token):
            raise KeyboardInterrupt

    path = tmp_path / "eagle.part"
    with pytest.raises(KeyboardInterrupt):
        fit_draft_head(lines, embedding, embedding, STYLE, stop_in_the_second_pass, 2, 3, path)
    seen.clear()
    resumed = fit_draft_head(lines, embedding, embedding, STYLE, seen.append, 2, 3, path)
    assert seen[0] == len(lines.token) and sum(seen) == 3 * len(lines.token)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_a_draft_head_stops_where_it_no_longer_gains(monkeypatch, tmp_path):
    """Its last pass, in which the rate falls, is the one after."""
    monkeypatch.setattr(draft_head, "BATCH_ROWS", 128)
    losses = iter([3.0, 2.0, 1.0, 0.999, 0.9])
    monkeypatch.setattr(draft_head._Teacher, "held_out_loss", lambda *given: next(losses))
    torch.manual_seed(0)
    embedding, seen = torch.randn(40, 64), []
    lines, _ = made_lines(embedding, lines=6)
    path = tmp_path / "eagle.part"
    fit_draft_head(lines, embedding, embedding, STYLE, seen.append, 2, 9, path, held_out=lines)
    assert load_file(path)["losses"].tolist() == [3.0, 2.0, 1.0, 0.999, 0.9]
    assert sum(seen) == 9 * len(lines.token)
