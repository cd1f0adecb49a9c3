"""Measurements guard themselves: ratios under a disturbed clock, and answers that take turns."""

import pytest
from models import random_artifact, tiny_model

import eepass
from eepass.benchmark.frontier import frontier
from eepass.benchmark.turns import (
    BLOCK_TOKENS,
    MOST_SPREAD,
    EngineStream,
    Stream,
    decode_in_turns,
    speed_up,
)
from eepass.config import ExitConfig


class Machine:
    """A simulated clock; ``slower(now)`` says how much slower everything is at that moment."""

    def __init__(self, slower=lambda now: 1.0):
        self.now, self.slower = 0.0, slower

    def clock(self):
        return self.now

    def stream(self, ms, tokens, slower=lambda now: 1.0, per_pass=1):
        """A system that takes ``ms`` a token, disturbed on its own by ``slower``."""

        def passes():
            yield [0]
            for _ in range(0, tokens, per_pass):
                self.now += per_pass * ms * self.slower(self.now) * slower(self.now)
                yield [1] * per_pass

        return Stream(passes())

    def measure(self, prompts=8, tokens=64, disturbed=lambda now: 1.0):
        """The speed-up of a system twice as fast as a reference that ``disturbed`` slows."""
        reference, system = [], []
        for turn in range(prompts):
            streams = {
                "reference": self.stream(8.0, tokens, disturbed),
                "system": self.stream(4.0, tokens, per_pass=2),
            }
            found = decode_in_turns(streams, turn, self.clock)
            reference.append(found["reference"])
            system.append(found["system"])
        return speed_up(reference, system)


def test_a_steady_machine_gives_the_ratio():
    found = Machine().measure()
    assert (found.value, found.lower, found.upper) == (2.0, 2.0, 2.0)
    assert found.blocks == 8 * 64 // BLOCK_TOKENS
    assert found.to_json("ratio")["ratio_spread"]["highest"] == 2.0


def test_a_machine_that_is_busy_for_seconds_leaves_the_ratio():
    # rounds take about 0.2 s: each spell covers several, and ends in the midst of one
    busy = Machine(lambda now: 3.0 if now % 4000 < 1900 else 1.0)
    found = busy.measure(prompts=32)
    assert found.value == pytest.approx(2.0, rel=0.02)
    assert found.lowest < 1.9 and found.highest > 2.1


def test_short_spells_that_hit_the_reference_alone_are_outvoted():
    found = Machine().measure(disturbed=lambda now: 5.0 if now % 2000 < 200 else 1.0)
    assert found.value == 2.0 and found.highest > 4.0


def test_a_reference_that_is_disturbed_half_the_time_gives_no_ratio():
    found = Machine().measure(disturbed=lambda now: 5.0 if now % 2000 < 1000 else 1.0)
    assert found.value is None
    assert found.upper > MOST_SPREAD * found.lower
    written = found.to_json("ratio")
    assert written["ratio"] is None and written["ratio_spread"]["lowest"] == 2.0
    assert written["ratio_spread"]["highest"] == 10.0


def test_two_blocks_that_disagree_give_no_ratio():
    found = Machine().measure(prompts=1, tokens=32, disturbed=lambda now: 1 + 2 * (now > 150))
    assert found.blocks == 2 and found.value is None


def test_systems_take_turns_and_the_order_rotates():
    ran = []

    def stream(name):
        def passes():
            yield [0]
            for _ in range(3 * BLOCK_TOKENS):
                ran.append(name)
                yield [1]

        return Stream(passes())

    decode_in_turns({name: stream(name) for name in "abc"}, first=1)
    assert "".join(ran[::BLOCK_TOKENS]) == "bcacababc"


def test_what_is_left_of_an_answer_counts_to_the_block_before():
    machine = Machine()
    found = decode_in_turns({"it": machine.stream(1.0, BLOCK_TOKENS + 3)}, clock=machine.clock)
    assert [block.tokens for block in found["it"].blocks] == [BLOCK_TOKENS + 3]
    assert len(found["it"].tokens) == BLOCK_TOKENS + 4
    assert found["it"].seconds_per_token == 1.0
    none = decode_in_turns({"it": Stream(iter([[5]]))})["it"]
    assert none.tokens == [5] and not none.blocks
    assert speed_up([none], [none]).value is None


@pytest.fixture(scope="module")
def model():
    model = tiny_model("llama")
    return eepass.transform(model, random_artifact(model), max_length=128)


def test_engines_that_share_a_cache_answer_in_turns_as_they_do_alone(model):
    ids, stop, most = [5, 9, 40, 33], frozenset(), 3 * BLOCK_TOKENS + 5
    engines = {
        "dense": model.dense,
        "early": model.configure(ExitConfig().approximate()),
        "exact": model.configure(ExitConfig(exits=True, speculate="off")),
        "drafts": model.configure(ExitConfig(exits=False)),
    }
    alone = {n: [s.token for s in e.generate(ids, most, stop)] for n, e in engines.items()}
    streams = {n: EngineStream.generate(e, ids, most, stop) for n, e in engines.items()}
    found = decode_in_turns(streams)
    assert {name: answer.tokens for name, answer in found.items()} == alone
    assert alone["dense"] != alone["early"] and model.decoder.kv.unused
    follow = model.dense.follow(ids, alone["dense"]), engines["early"].follow(ids, alone["dense"])
    streams = {n: EngineStream.follow(engines[n], ids, alone["dense"]) for n in ("dense", "early")}
    decode_in_turns(streams)
    assert (streams["dense"].followed, streams["early"].followed) == follow


def test_a_frontier_measures_all_settings_in_turns(model, monkeypatch):
    # as far as the random artefact is calibrated
    targets = (0.9, 0.94)
    monkeypatch.setattr("eepass.benchmark.frontier.TARGETS", targets)
    ids = [5, 9, 40, 33]
    answer = [step.token for step in model.dense.generate(ids, 40)]
    stages = []
    points = frontier(model, [ExitConfig()], [(ids, answer)] * 2, lambda *at: stages.append(at))
    assert [point["target"] for point in points] == list(targets)
    assert stages == [("teacher forcing", 0, 2), ("teacher forcing", 1, 2)]
    for point in points:
        assert point["preset"] == "default" and 0 <= point["agreement"] <= 1
        spread = point["ratio_to_dense_spread"]
        assert spread["blocks"] == 4 and 0 < spread["lowest"] <= spread["highest"]
        value = point["ratio_to_dense"]
        assert value is None or spread["lower"] <= value <= spread["upper"]


def test_a_stream_that_is_not_brought_back_finds_the_cache_of_another(model, monkeypatch):
    """Without what ``resume`` does, answers are wrong: the test above can tell."""
    ids, stop = [5, 9, 40, 33], frozenset()
    alone = [s.token for s in model.dense.generate(ids, 60, stop)]
    monkeypatch.setattr(EngineStream, "_state", lambda self: [])
    streams = {
        "it": EngineStream.generate(model.dense, ids, 60, stop),
        "other": EngineStream.generate(model.dense, [7] * 30, 60, stop),
    }
    assert decode_in_turns(streams)["it"].tokens != alone
