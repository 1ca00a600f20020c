"""What the hub, or the way to it, refused: in words, with the fix."""

from __future__ import annotations

from collections.abc import Collection

from nanoengine.api import ModelSourceError


def hub_failures() -> tuple[type[Exception], ...]:
    """What the library raises: its own HTTP errors and the client's, files and disk, impossible ids, hf_xet's."""
    from huggingface_hub import errors

    xet = getattr(errors, "XetDownloadError", RuntimeError)  # not in older versions
    return (errors.HTTPError, OSError, ValueError, RuntimeError, xet)  # type: ignore[attr-defined]


def cause_of(error: Exception) -> str:
    """In a few words."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set"
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        return f"{constants.ENDPOINT} answered {error.response.status_code}"
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{constants.ENDPOINT} could not be asked ({type(error).__name__}{': ' if line else ''}{line})"


def explain(error: Exception, repo: str, revision: str, *, downloading: bool = False) -> ModelSourceError:
    """The error to raise for one of the library's."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    if isinstance(error, errors.GatedRepoError):
        text = f"{repo} is gated: accept its terms on {page}, then {_log_in()}"
    elif isinstance(error, errors.DisabledRepoError):
        text = f"{repo} was disabled by the hub; {page} may tell why"
    elif isinstance(error, errors.RevisionNotFoundError):
        text = f"{repo} has no revision {revision!r}{_revisions(repo)}"
    elif isinstance(error, errors.RepositoryNotFoundError):
        text = (
            f"there is no folder {repo} here, and no repository of that name on {constants.ENDPOINT} that could be "
            f"read: check the spelling; if it is private, {_log_in()}"
        )
    elif isinstance(error, errors.HFValidationError):
        text = f"{repo!r} is no folder, and cannot be a hub id: {error}"
    elif isinstance(error, errors.HfHubHTTPError) and getattr(error.response, "status_code", 0) in (401, 403):
        text = f"{cause_of(error)} to {repo}: it is private or not there, or the token is not good for it; {_log_in()}"
    elif downloading:
        text = f"fetching {repo} broke off: {_chain(error)}; run it again: files that are finished are kept"
    else:
        offline = isinstance(error, errors.OfflineModeIsEnabled)
        fix = "unset it" if offline else "check network and proxy, or set HF_ENDPOINT to a mirror"
        text = (
            f"{repo}@{revision} is not, or not wholly, in the cache {constants.HF_HUB_CACHE}, and {cause_of(error)}: "
            f"{fix}, or run `hf download {repo}` elsewhere and bring the folder. There is no folder {repo} here either"
        )
    return ModelSourceError(text)


def nothing_to_serve(name: str, lack: str, files: Collection[str]) -> ModelSourceError:
    """For a repository that is there, but holds other things."""
    repo, _, revision = name.partition("@")
    at = "" if revision == "main" else f"@{revision}"
    ggufs = sorted(file for file in files if file.endswith(".gguf"))
    if ggufs:
        fix = f"it has .gguf files; give one of them: {', '.join(f'{repo}/{file}{at}' for file in ggufs[:8])}"
    elif any(file.endswith((".bin", ".pt", ".pth")) for file in files):
        fix = "it has weights in pickle files only, which are not served: take a repository with safetensors"
    elif "adapter_config.json" in files:
        fix = "it holds an adapter, not a model: merge it into its base model first"
    else:
        fix = f"it holds {', '.join(sorted(files)[:8]) or 'no files'}; take a repository of a transformers model"
    return ModelSourceError(f"{name} has {lack}: {fix}")


def _log_in() -> str:
    from huggingface_hub import get_token

    if get_token():
        return "use a token of an account that may read it (`hf auth login`, or HF_TOKEN; one is set, but does not do)"
    return "log in by `hf auth login`, or set HF_TOKEN"


def _revisions(repo: str) -> str:
    """Tail of a message: its branches and tags; "" if the hub does not tell."""
    from huggingface_hub import HfApi, constants

    try:
        refs = HfApi(endpoint=constants.ENDPOINT).list_repo_refs(repo)
    except hub_failures():  # the message is whole without it
        return ""
    return f"; it has {', '.join(ref.name for ref in (*refs.branches, *refs.tags))}, and commits of 40 digits"


def _chain(error: BaseException) -> str:
    """The error with its root cause: the library wraps network errors in general words."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    line = next(iter(str(root).strip().splitlines()), "")
    return f"{type(root).__name__}: {line}" if line else type(root).__name__
