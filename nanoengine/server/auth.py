"""API keys: who asks. Only hashes of keys are kept."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nanoengine.api.errors import ConfigError
from nanoengine.server.config import ServerConfig
from nanoengine.server.errors import ApiError

VARIABLE = "NANOENGINE_API_KEYS"
_HASHED = re.compile(r"(?:(?P<name>[^:\s]+):)?sha256:(?P<hash>[0-9a-fA-F]{64})")
_PLAIN = re.compile(r"(?:(?P<name>[^:\s]+):)?(?P<key>[\x21-\x39\x3b-\x7e]{8,512})")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. name: of the key; "" without keys. secret: of the key, for cache salts; None without keys."""

    name: str = ""
    secret: bytes | None = None


class Keys:
    """The configured keys. Without any, everyone may ask.

    Args:
        hashes: SHA-256 of a key -> its name.
    """

    def __init__(self, hashes: Mapping[bytes, str]) -> None:
        self._hashes = dict(hashes)

    def __len__(self) -> int:
        return len(self._hashes)

    @property
    def entries(self) -> tuple[str, ...]:
        """Each as in `ServerConfig.api_keys`."""
        return tuple(f"{name}:sha256:{digest.hex()}" for digest, name in self._hashes.items())

    def caller(self, headers: Mapping[bytes, bytes], *, page: bool = False) -> Caller:
        """The owner of the key in `Authorization: Bearer KEY` or `x-api-key: KEY`. Raises `ApiError` 401.

        page: for people, whose browser asks for a name and a password (`Authorization: Basic`), which is the key. Not
            for what acts: a browser sends it again by itself, also for a page of another origin.
        """
        if not self._hashes:
            return Caller()
        kind, _, token = headers.get(b"authorization", b"").partition(b" ")
        key = token.strip() if kind.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        if page and kind.lower() == b"basic":
            key = _password(token)
        # The hash is looked up, not the key: how long that takes says nothing about a key.
        name = self._hashes.get(hashlib.sha256(key).digest()) if key else None
        if name is None:
            words = "this key is not known" if key else "a key is needed"
            raise ApiError(
                401,
                f"{words}: send the header 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
                "invalid_api_key",
                headers={"www-authenticate": 'Basic realm="any name, and an API key"' if page else "Bearer"},
            )
        return Caller(name, hashlib.sha256(b"nanoengine cache salt:" + key).digest())


def _password(token: bytes) -> bytes:
    try:
        return base64.b64decode(token, validate=True).partition(b":")[2]
    except ValueError:
        return b""


def configured_keys(config: ServerConfig, environment: Mapping[str, str] = os.environ) -> Keys:
    """The keys of the configuration, its file and the environment. Raises `ConfigError`; no message has a key."""
    hashes: dict[bytes, str] = {}
    _add(hashes, config.api_keys, "server.api_keys", hashed=True)
    if config.api_keys_file is not None:
        try:
            lines = Path(config.api_keys_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"server.api_keys_file cannot be read: {error}") from error
        kept = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not kept:
            raise ConfigError(f"server.api_keys_file: {config.api_keys_file} has no keys, so everyone could ask")
        _add(hashes, kept, "server.api_keys_file")
    given = environment.get(VARIABLE)
    if given is not None:
        _add(hashes, [part.strip() for part in given.split(",")], VARIABLE)
    return Keys(hashes)


def _add(hashes: dict[bytes, str], entries: Iterable[str], where: str, hashed: bool = False) -> None:
    for number, entry in enumerate(entries, start=1):
        found = _HASHED.fullmatch(entry)
        if found is not None:
            digest = bytes.fromhex(found["hash"])
        elif not hashed and (found := _PLAIN.fullmatch(entry)) is not None:
            digest = hashlib.sha256(found["key"].encode()).digest()
        else:
            valid = "NAME:sha256:HEX or sha256:HEX" if hashed else "KEY, NAME:KEY or NAME:sha256:HEX"
            raise ConfigError(
                f"{where}: entry {number} is not {valid}"
                + ("; keys themselves belong in server.api_keys_file or NANOENGINE_API_KEYS" if hashed else "")
                + "; a key has 8 to 512 visible ASCII characters, but no colon"
            )
        hashes[digest] = found["name"] or digest.hex()[:8]
