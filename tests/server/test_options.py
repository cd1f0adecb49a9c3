"""Options: checked by name, from a file or flags."""

import pytest
from command_line import refused

from eepass.errors import InputError
from eepass.server.options import ServerOptions, read_options
from eepass.server.served import model_id


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"port": 70000}, "port=70000: must be a whole number from 0 to 65535"),
        ({"port": 80.0}, "port"),
        ({"port": True}, "port"),
        ({"max_waiting": 0}, "max_waiting"),
        ({"max_body_bytes": "1"}, "max_body_bytes"),
        ({"timeout": float("nan")}, "timeout"),
        ({"timeout": -1}, "timeout"),
        ({"slow_timeout": None}, "slow_timeout"),
        ({"host": 1}, "host"),
        ({"allow_host": "my.name"}, "allow_host='my.name': must be a list"),
        ({"allow_origin": [1]}, "allow_origin"),
        ({"remember": 1}, "remember"),
        ({"log_level": "loud"}, "log_level"),
        ({"speculate": "guess"}, "speculate"),
        ({"api_key": "ключ"}, "api_key"),
        ({"prot": 80}, "prot: no option of the server; known: host, port"),
    ],
    ids=str,
)
def test_wrong_options_are_named(options, reason, start):
    with pytest.raises(ValueError, match=reason.replace("(", r"\(")):
        start(**options)


def test_an_option_may_be_left_out():
    found = ServerOptions.of({"at_once": None, "api_key": None, "timeout": 3})
    assert found.at_once is None and found.timeout == 3
    assert "secret" not in repr(ServerOptions(api_key="secret"))
    with pytest.raises(InputError, match="api_key") as refusal:
        ServerOptions(api_key="secret\xff")
    assert "secret" not in str(refusal.value)


def test_a_file(tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text('port = 0\nmax-waiting = 3\nallow_host = ["a", "b"]\n')
    found = ServerOptions.of(read_options(file))
    assert (found.port, found.max_waiting, found.allow_host) == (0, 3, ("a", "b"))


def test_the_command_says_what_is_wrong(tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text("port = 0\nmax-wating = 3\n")
    assert "max_wating: no option" in refused("serve", "smollm2", "--config", file)
    file.write_text("port = \n")
    assert "cannot be read as TOML" in refused("serve", "smollm2", "--config", file)
    assert "port=99999" in refused("serve", "smollm2", "--port", "99999")
    assert "no such model" in refused("serve", "nowhere", "--port", "0")


def test_names_show_no_path(tmp_path):
    assert model_id(str(tmp_path / "weights" / "Some.Model.gguf")) == "Some.Model"
    assert model_id(str(tmp_path)) == tmp_path.name
    assert model_id("../other/place/model") == "model"
    assert model_id("Qwen/Qwen2.5-Coder-1.5B") == "Qwen/Qwen2.5-Coder-1.5B"
    assert model_id("smollm2") == "smollm2"
