from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eepass.config import ExitConfig


@pytest.mark.parametrize(
    "options",
    (
        {"kv": "keep"},
        {"target_agreement": 1.5},
        {"threshold": -0.1},
        {"pending": 99},
        {"draft": "oracle"},
        {"guarantee": "maybe"},
        {"speculate": "wildly"},
    ),
    ids=str,
)
def test_a_bad_option_is_named_with_its_value(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        ExitConfig(**options)


@given(
    target=st.floats(0.01, 0.99),
    kv=st.sampled_from(("defer", "propagate", "drop")),
    pending=st.integers(0, 31),
)
def test_it_survives_json(target, kv, pending):
    config = replace(ExitConfig().approximate(target), kv=kv, pending=pending)
    assert ExitConfig.from_json(config.to_json()) == config


def test_holes_in_the_cache_go_with_plain_early_exit_only():
    for kv in ("propagate", "drop"):
        with pytest.raises(ValueError, match=f"kv='{kv}'"):
            ExitConfig(kv=kv)
        with pytest.raises(ValueError, match=f"kv='{kv}'"):
            ExitConfig(kv=kv, guarantee="approximate")
        replace(ExitConfig().approximate(), kv=kv)


def test_the_ways_of_decoding_follow_from_the_options():
    assert ExitConfig().modes == ("dense", "exits", "speculation", "both")
    assert ExitConfig(exits=False).modes == ("dense", "speculation")
    assert ExitConfig(speculate="lens").modes == ("dense", "exits")
    assert ExitConfig(adaptive=False).modes == ("both",)
    assert ExitConfig().approximate().modes == ("exits",)
    assert ExitConfig.preset("paper").modes == ("exits",)
    assert ExitConfig(exits=False, speculate="off").modes == ("dense",)


def test_unknown_options_are_listed():
    with pytest.raises(ValueError, match="speed"):
        ExitConfig.from_json({"speed": 9})
    with pytest.raises(ValueError, match="default, paper"):
        ExitConfig.preset("fast")
