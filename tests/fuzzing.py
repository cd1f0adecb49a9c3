"""Inputs damaged at random: bytes cut and flipped, values of other JSON types, sizes inflated."""

import hashlib
import json
import random
import resource
import signal
from contextlib import contextmanager

# what a refusal may take: seconds of processor time, and kilobytes more than before
SECONDS, KILOBYTES = 2.0, 500_000
OTHER = (
    None, True, False, 0, -1, 1.5, 1 << 31, 1 << 40, 10**9, -(1 << 62), float("nan"), float("inf"),
    "", "text", "\ud800", "\u2028", [], [[]], {}, {"a": {}}, [None], [-1], [1 << 40],
)  # fmt: skip


class TooLong(BaseException):
    """A case that takes more than ``SECONDS``; no ``Exception``, so that nothing explains it."""


def damaged_bytes(data: bytes, chance: random.Random) -> bytes:
    """``data`` cut short, with some bytes flipped, or with a number of eight bytes inflated."""
    kind, at = chance.choice(("cut", "flip", "inflate")), chance.randrange(max(len(data), 1))
    if kind == "cut":
        return data[:at]
    changed = bytearray(data)
    if kind == "flip":
        for _ in range(chance.randint(1, 4)):
            # damage to what comes first is worse
            changed[min(chance.randrange(len(data)), chance.randrange(len(data)))] ^= (
                1 << chance.randrange(8)
            )
        return bytes(changed)
    changed[at : at + 8] = (1 << chance.randrange(63)).to_bytes(8, "little")[: len(data) - at]
    return bytes(changed)


def damaged_json(text: str, chance: random.Random) -> str:
    """JSON with one value, or the whole, replaced by another, or nested without end."""
    if chance.random() < 0.05:
        return '{"a": [' * 50_000
    root = [json.loads(text)]
    place, name = root, 0
    while isinstance(place[name], (dict, list)) and place[name] and chance.random() < 0.85:
        place = place[name]
        name = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
    if isinstance(place, dict) and chance.random() < 0.2:
        del place[name]
    else:
        place[name] = chance.choice(OTHER)
    return json.dumps(root[0])


def damage_file(path, chance):
    """Damage a file, as JSON or lines of JSON where it is that."""
    data = path.read_bytes()
    if path.suffix not in (".json", ".jsonl") or chance.random() < 0.3:
        path.write_bytes(damaged_bytes(data, chance))
        return
    lines = [data.decode()] if path.suffix == ".json" else data.decode().splitlines()
    at = chance.randrange(len(lines))
    lines[at] = damaged_json(lines[at], chance)
    path.write_text("\n".join(lines), encoding="utf-8")


def digests(folder):
    """A hash of every file in ``folder``."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@contextmanager
def bounded():
    """What is inside takes no more processor time and memory than a refusal may."""

    def stop(*_):
        raise TooLong

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handler = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < KILOBYTES
