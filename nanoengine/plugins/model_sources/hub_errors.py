"""Messages for errors of the hub or of the connection to it, with the fix."""

from __future__ import annotations

from collections.abc import Collection

from nanoengine.api import ModelSourceError


def hub_failures() -> tuple[type[Exception], ...]:
    """The errors that the library raises: HTTP errors, errors of files and disk, invalid ids, errors of hf_xet."""
    from huggingface_hub import errors

    xet = getattr(errors, "XetDownloadError", RuntimeError)  # older versions do not have it
    return (errors.HTTPError, OSError, ValueError, RuntimeError, xet)  # type: ignore[attr-defined]


def cause_of(error: Exception) -> str:
    """The cause of an error in a few words."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set"
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        return f"{constants.ENDPOINT} answered {error.response.status_code}"
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{constants.ENDPOINT} could not be reached ({type(error).__name__}{': ' if line else ''}{line})"


def explain(error: Exception, repo: str, revision: str, *, downloading: bool = False) -> ModelSourceError:
    """The error to raise for an error of the library."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    if isinstance(error, errors.GatedRepoError):
        text = f"{repo} is gated: accept its terms on {page}, then {_log_in()}"
    elif isinstance(error, errors.DisabledRepoError):
        text = f"{repo} was disabled by the hub; {page} may say why"
    elif isinstance(error, errors.RevisionNotFoundError):
        text = f"{repo} has no revision {revision!r}{_revisions(repo)}"
    elif isinstance(error, errors.RepositoryNotFoundError):
        text = (
            f"there is no folder {repo} here, and no repository of that name on {constants.ENDPOINT} that could be "
            f"read: check the spelling; if it is private, {_log_in()}"
        )
    elif isinstance(error, errors.HFValidationError):
        text = f"{repo!r} is not a folder, and cannot be a hub id: {error}"
    elif isinstance(error, errors.HfHubHTTPError) and getattr(error.response, "status_code", 0) in (401, 403):
        text = (
            f"{cause_of(error)} for {repo}: it is private or does not exist, or the token may not read it; {_log_in()}"
        )
    elif downloading:
        text = f"the download of {repo} was interrupted: {_chain(error)}; run it again: finished files are kept"
    else:
        offline = isinstance(error, errors.OfflineModeIsEnabled)
        fix = "unset it" if offline else "check network and proxy, or set HF_ENDPOINT to a mirror"
        text = (
            f"{repo}@{revision} is not, or not completely, in the cache {constants.HF_HUB_CACHE}, and "
            f"{cause_of(error)}: {fix}, or run `hf download {repo}` elsewhere and copy the folder. "
            f"There is no folder {repo} here either"
        )
    return ModelSourceError(text)


def not_a_model(name: str, lack: str, files: Collection[str]) -> ModelSourceError:
    """The error for a repository that exists but has other files. `lack`: what is missing."""
    repo, _, revision = name.partition("@")
    at = "" if revision == "main" else f"@{revision}"
    ggufs = sorted(file for file in files if file.endswith(".gguf"))
    if ggufs:
        fix = f"it has .gguf files; give one of them: {', '.join(f'{repo}/{file}{at}' for file in ggufs[:8])}"
    elif any(file.endswith((".bin", ".pt", ".pth")) for file in files):
        fix = "it has weights only in pickle files, which are not supported: take a repository with safetensors"
    elif "adapter_config.json" in files:
        fix = "it is an adapter, not a model: merge it into its base model first"
    else:
        fix = f"it has {', '.join(sorted(files)[:8]) or 'no files'}; take a repository of a transformers model"
    return ModelSourceError(f"{name} has {lack}: {fix}")


def _log_in() -> str:
    from huggingface_hub import get_token

    if get_token():
        return "use a token of an account that may read it (`hf auth login`, or HF_TOKEN; the current token may not)"
    return "log in by `hf auth login`, or set HF_TOKEN"


def _revisions(repo: str) -> str:
    """The end of a message: branches and tags of the repository; "" if the hub does not answer."""
    from huggingface_hub import HfApi, constants

    try:
        refs = HfApi(endpoint=constants.ENDPOINT).list_repo_refs(repo)
    except hub_failures():  # the message is complete without it
        return ""
    return f"; it has {', '.join(ref.name for ref in (*refs.branches, *refs.tags))}, and commits of 40 digits"


def _chain(error: BaseException) -> str:
    """The error with its root cause, because the library's message about network errors is general."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    line = next(iter(str(root).strip().splitlines()), "")
    return f"{type(root).__name__}: {line}" if line else type(root).__name__
