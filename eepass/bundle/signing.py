"""Sign files with this user's key, and find out who signed a file: Ed25519, one key per user.

The key is created on first use in ``$XDG_CONFIG_HOME/eepass/signing.key`` (by default
``~/.config/eepass``), readable by its owner alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from eepass.errors import InputError
from eepass.reading import parse_json


def key_file() -> Path:
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return home / "eepass" / "signing.key"


def ready_to_sign() -> Ed25519PrivateKey:
    """This user's key, created if there is none; ``InputError`` or ``OSError`` where it cannot be
    used."""
    _create_key(key_file())
    return _load_key(key_file())


def sign(data: bytes) -> bytes:
    """A signature of ``data`` as JSON bytes: the public key and Ed25519's signature, in hex."""
    key = ready_to_sign()
    signed = {"key": _public(key), "signature": key.sign(data).hex()}
    return json.dumps(signed, indent=1).encode() + b"\n"


def signer_of(data: bytes, signature: bytes, where: Path) -> str:
    """The public key, in hex, that made the ``signature`` of ``data``.

    Raises ``InputError`` naming ``where`` if it is damaged or the signature of other data.
    """
    try:
        signed = parse_json(signature)
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signed["key"]))
        public.verify(bytes.fromhex(signed["signature"]), data)
    except (ValueError, KeyError, TypeError, InvalidSignature) as error:
        raise InputError(
            f"{where}: not the signature of the file beside it, which was altered or cut short; "
            "run eepass transform again"
        ) from error
    return str(signed["key"])


def own_key() -> str | None:
    """This user's public key in hex, or None if there is none yet."""
    file = key_file()
    return _public(_load_key(file)) if file.exists() else None


def _load_key(file: Path) -> Ed25519PrivateKey:
    if stat.S_IMODE(file.stat().st_mode) & 0o077:
        raise InputError(f"{file}: others can read this key; run chmod 600 on it, or remove it")
    try:
        key = serialization.load_pem_private_key(file.read_bytes(), password=None)
    except TypeError as error:
        # it asks for a password that was not given
        raise InputError(
            f"{file}: encrypted, and eepass asks for no password; decrypt it, or remove it: a new "
            "one will be created"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"{file}: damaged; remove it, a new one will be created") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{file}: not an Ed25519 key; remove it, a new one will be created")
    return key


def _create_key(file: Path) -> None:
    """Create the key if there is none."""
    if file.exists():
        return
    text = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # written with mode 0600, linked when it is whole; of two processes the first wins
    handle, scratch = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as opened:
            opened.write(text)
        with contextlib.suppress(FileExistsError):
            os.link(scratch, file)
    finally:
        os.unlink(scratch)


def _public(key: Ed25519PrivateKey) -> str:
    raw = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return raw.hex()
