"""The key that tells this user's folders from those of others."""

import json
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography.hazmat.primitives import serialization

from eepass.bundle import signing
from eepass.errors import InputError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path


def test_a_key_is_made_on_first_use_for_its_owner_alone(home):
    assert signing.own_key() is None
    signature = signing.sign(b"data")
    file = signing.key_file()
    assert file.is_relative_to(home)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert signing.signer_of(b"data", signature, file) == signing.own_key()
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert signing.sign(b"data") == signature


def test_first_use_by_many_makes_one_key():
    with ThreadPoolExecutor(8) as pool:
        signed = list(pool.map(signing.sign, [b"data"] * 8))
    assert len({json.loads(signature)["key"] for signature in signed}) == 1


@pytest.mark.parametrize("damage", ("data", "signature", "key", "json"))
def test_what_was_altered_is_refused(home, damage):
    data, signature = b"data", signing.sign(b"data")
    if damage == "data":
        data = b"date"
    elif damage == "json":
        signature = signature[:-20]
    else:
        signed = json.loads(signature)
        first = "0" if signed[damage][0] != "0" else "1"
        signature = json.dumps({**signed, damage: first + signed[damage][1:]}).encode()
    with pytest.raises(InputError, match=r"the-file.*altered or cut short"):
        signing.signer_of(data, signature, home / "the-file")


def test_a_key_others_can_read_is_no_key():
    signing.sign(b"data")
    signing.key_file().chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        signing.own_key()
    signing.key_file().chmod(0o600)
    signing.key_file().write_text("-----BEGIN NOTHING-----")
    with pytest.raises(InputError, match="damaged"):
        signing.sign(b"data")


def test_an_encrypted_key_says_so():
    signing.sign(b"data")
    key = serialization.load_pem_private_key(signing.key_file().read_bytes(), None)
    signing.key_file().write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"word"),
        )
    )
    with pytest.raises(InputError, match="encrypted"):
        signing.own_key()
    signing.key_file().write_bytes(
        b"-----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----\n"
    )
    with pytest.raises(InputError, match="damaged"):
        signing.own_key()


@pytest.mark.parametrize("signature", (b"[]", b"null", b"[" * 100_000, b'{"key": 3}'))
def test_signatures_of_another_type(home, signature):
    with pytest.raises(InputError, match="altered or cut short"):
        signing.signer_of(b"data", signature, home / "the-file")
