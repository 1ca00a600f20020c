"""Downloads of a hub repository, and use of the cache if the hub cannot be reached."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from nanoengine.api import ModelSourceError, SourceContext
from nanoengine.plugins.model_sources.hub_errors import (
    cause_of,
    explain,
    hub_failures,
    not_a_model,
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SMALL_FILES = (
    "config.json", "generation_config.json", INDEX, "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json", "modules.json",
)  # fmt: skip
"""The files that are read in addition to the weights. Repositories may have many gigabytes of other formats."""
PATTERNS = (
    "additional_chat_templates/*.jinja",  # of a model with several templates, e.g. for tools
    "[0-9]_Pooling/config.json",  # of sentence-transformers: how embeddings are made
)

_COMMIT = re.compile("[0-9a-f]{40}")
_TIMEOUT = 10.0  # seconds for the hub to answer
# If the process ends, unfinished files are downloaded again from their start, so only few are downloaded at a time.
# hf_xet downloads the parts of a file in parallel.
_FILES_AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class _Listing:
    """A revision on the hub: its commit, and its files with sizes in bytes (None: not known)."""

    commit: str
    sizes: Mapping[str, int | None]


@dataclass(frozen=True, slots=True)
class HubRepository:
    """A model repository at a revision.

    Attributes:
        repo: "owner/name". revision: branch, tag or commit. ctx: the context of the source.
    """

    repo: str
    revision: str
    ctx: SourceContext

    @property
    def name(self) -> str:
        return f"{self.repo}@{self.revision}"

    def folder(self) -> Path:
        """The folder of the snapshot with config, tokenizer and safetensors. Missing files are downloaded.

        If the revision is a commit that is complete in the cache, the hub is not asked.

        Raises `ModelSourceError`.
        """
        cached = self._cached()
        if cached is not None and _COMMIT.fullmatch(self.revision):
            return self._said(cached)
        listing = self._ask(cached)
        there = sorted(listing.sizes) if listing is not None else []
        wanted = [name for name in there if name in SMALL_FILES or any(fnmatchcase(name, each) for each in PATTERNS)]
        current = listing is None or (cached is not None and cached.name == listing.commit)
        if cached is not None and current and not _absent(cached, wanted):
            return self._said(cached)
        assert listing is not None  # `_ask` raises if nothing is in the cache
        if "config.json" not in listing.sizes:
            raise not_a_model(self.name, "no config.json", listing.sizes)
        return self._said(self._fetched(listing, wanted))

    def file(self, name: str) -> Path:
        """The path of one file, given its path in the repository. Raises `ModelSourceError`."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo, name, revision=self.revision)
        cached = Path(found) if isinstance(found, str) else None
        if cached is not None and _COMMIT.fullmatch(self.revision):
            return cached
        listing = self._ask(cached)
        if cached is not None and (listing is None or listing.commit in cached.parts):
            return cached
        assert listing is not None
        if name not in listing.sizes:
            raise not_a_model(self.name, f"no file {name}", listing.sizes)
        self._say_fetching(listing, [name])
        return self._download([name], self.revision) / name

    # The hub

    def _ask(self, cached: Path | None) -> _Listing | None:
        """The current files on the hub. None, which is reported, if it cannot be reached and `cached` can be used.

        Raises `ModelSourceError` if nothing is in the cache, or if the hub has no such revision.
        """
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import RevisionNotFoundError

        try:
            api = HfApi(endpoint=constants.ENDPOINT, library_name="nanoengine")
            info = api.model_info(self.repo, revision=self.revision, files_metadata=True, timeout=_TIMEOUT)
        except hub_failures() as error:
            if cached is None or isinstance(error, RevisionNotFoundError):
                raise explain(error, self.repo, self.revision) from error
            self.ctx.say(f"{cause_of(error)}: using {self.name} from the cache, which may be older")
            return None
        if info.sha is None:
            raise ModelSourceError(f"{constants.ENDPOINT} returned no commit of {self.name}; is it a hub?")
        return _Listing(info.sha, {file.rfilename: file.size for file in info.siblings or ()})

    def _fetched(self, listing: _Listing, wanted: Sequence[str]) -> Path:
        """Downloads missing files and returns the folder. Small files come first: the index names the others."""
        folder = self._download(wanted, self.revision, bars=False)
        weights = weight_files(folder, self.name, listing.sizes)
        missing = _absent(folder, weights)
        if missing:
            self._say_fetching(listing, missing)
            self._download(missing, folder.name)  # the commit of the small files, because the branch may have moved
        still = _lacking(folder)
        if still:
            raise ModelSourceError(f"{self.name} changed during the download: {', '.join(still)} missing; try again")
        return folder

    def _download(self, names: Sequence[str], revision: str, *, bars: bool = True) -> Path:
        """Downloads `names` and returns the folder of the snapshot. Raises `ModelSourceError`."""
        from huggingface_hub import constants, snapshot_download

        try:
            return Path(
                snapshot_download(
                    self.repo,
                    revision=revision,
                    allow_patterns=[glob.escape(name) for name in names],
                    endpoint=constants.ENDPOINT,
                    library_name="nanoengine",
                    max_workers=_FILES_AT_ONCE,
                    tqdm_class=None if bars and os.environ.get("TERM") != "dumb" else _no_bars(),
                )
            )
        except hub_failures() as error:
            raise explain(error, self.repo, self.revision, downloading=True) from error

    def _say_fetching(self, listing: _Listing, names: Sequence[str]) -> None:
        from huggingface_hub import constants

        size = sum(listing.sizes.get(name) or 0 for name in names)
        files = names[0] if len(names) == 1 else f"{len(names)} files"
        self.ctx.say(
            f"downloading {self.name} from {constants.ENDPOINT}: {files}, {size / 1e6:,.1f} MB, into "
            f"{constants.HF_HUB_CACHE}"
        )

    # The cache

    def _cached(self) -> Path | None:
        """The folder of the snapshot in the cache, if it is complete."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = Path(
                snapshot_download(
                    self.repo, revision=self.revision, local_files_only=True, allow_patterns=[*SMALL_FILES, *PATTERNS]
                )
            )
        except (LocalEntryNotFoundError, ValueError):  # ValueError: an invalid id, for which the hub gives the message
            return None
        return None if _lacking(folder) else folder

    def _said(self, folder: Path) -> Path:
        self.ctx.say(f"{self.repo} at commit {folder.name[:12]}, in {folder}")
        return folder


def weight_files(folder: Path, name: str, present: Collection[str]) -> list[str]:
    """The files of the weights: model.safetensors, or those in the index. Raises `ModelSourceError` if one is missing.

    If there are both, model.safetensors is used, as in transformers: an index in addition to it is outdated or says the
    same.
    """
    shards = _shards(folder / INDEX) if (folder / INDEX).is_file() else []
    if SINGLE in present and SINGLE not in shards:
        return [SINGLE]
    if not shards:
        raise not_a_model(name, f"neither {SINGLE} nor {INDEX}", present)
    missing = [shard for shard in shards if shard not in present]
    if missing:
        raise ModelSourceError(
            f"{INDEX} of {name} names {len(shards)} files, and {len(missing)} of them are missing: "
            f"{', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}; the checkpoint on the hub is incomplete: "
            "take another revision"
        )
    return shards


def _shards(index: Path) -> list[str]:
    try:
        names: Any = json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"].values()
        shards = sorted(set(names))
        if not shards or not all(Path(shard).name == shard for shard in shards):
            raise ValueError("weight_map must name files in the folder of the index")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelSourceError(f"{index} is not a safetensors index: {error!r}") from error
    return shards


def _no_bars() -> type[Any]:
    """Progress bars that show nothing: for small files, and for a terminal that cannot overwrite a line."""
    from tqdm import tqdm

    class NoBars(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)  # an argument of the library's own bars
            super().__init__(*args, **{**kwargs, "disable": True})

    return NoBars


def _lacking(folder: Path) -> list[str]:
    """The files of config.json and the weights that are missing in a snapshot."""
    weights = _shards(folder / INDEX) if (folder / INDEX).is_file() else [SINGLE]
    if (folder / SINGLE).is_file() and SINGLE not in weights:
        weights = [SINGLE]
    return _absent(folder, ["config.json", *weights])


def _absent(folder: Path, names: Sequence[str]) -> list[str]:
    return [name for name in names if not (folder / name).is_file()]
