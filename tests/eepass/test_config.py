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
    config = ExitConfig(target_agreement=target, kv=kv, pending=pending)
    assert ExitConfig.from_json(config.to_json()) == config


def test_unknown_options_are_listed():
    with pytest.raises(ValueError, match="speed"):
        ExitConfig.from_json({"speed": 9})
    with pytest.raises(ValueError, match="default, paper"):
        ExitConfig.preset("fast")
