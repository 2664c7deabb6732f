"""Paths inside an output folder. One folder of a million shots would be slow, so shots and keys are in 256 shards."""

import hashlib
import re

RECORD = "shot.json"
SHOTS = "shots"
KEYS = "keys"
SHARD = re.compile(r"[0-9a-f]{2}")
"""Name of a shard."""


def id_digest(shot_id: str) -> bytes:
    """Return the sha256 of an id. Its first byte is the shard of the shot."""
    return hashlib.sha256(shot_id.encode()).digest()


def shot_path(shot_id: str) -> str:
    """Return the folder to which a shot is written: `shots/<2 hexadecimal digits>/<id>`."""
    return f"{SHOTS}/{id_digest(shot_id)[:1].hex()}/{shot_id}"


def key_path(key: str) -> str:
    """Return the path of the file that holds the id of the shot with this content key."""
    return f"{KEYS}/{key[:2]}/{key}"
