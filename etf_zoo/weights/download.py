"""Files from the Hugging Face Hub: the client's own cache and progress, a checked sha256, errors that name the fix.

Downloads, their resumption, locks, cache and hashes are huggingface_hub's. Three things are not:

- `retry`: the client tries single requests again, not a body that breaks off or arrives too short on the way, nor a
  commit that the Hub answered with 5xx.
- Checking content: the client compares sizes when it downloads, and asks the Hub for hashes
  (`HfApi.verify_repo_checksums`) only when told to and with a network. Here every weights file is checked each time it
  is loaded, offline too, against the hash in its name in the cache and the one in the model's config.
- `hub_errors`: its exceptions come from several packages and give a page; here each is one sentence that names the fix.
"""

from __future__ import annotations

import errno
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.insecure_hashlib import sha1
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from ..errors import LoadError
from ..timm_compat import hf_split

__all__ = ["LOG_IN", "check_cached", "download", "hub_errors", "pin", "retry", "sha256"]

_HTTP_PACKAGES = ("httpx2", "httpx", "requests", "urllib3")  # the client's major versions differ in whose errors come
_LONGEST_WAIT = 60.0
_logger = logging.getLogger(__name__)
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"

T = TypeVar("T")


def sha256(path: Path) -> str:
    """Hex digest of a file.

    Example:
        >>> sha256(cards_folder() / "resnet50_etf.e60_tiny" / "model.safetensors")[:8]  # doctest: +SKIP
        '3a7bd3e2'
    """
    with open(path, "rb") as file:
        return sha_fileobj(file).hex()


def download(
    repo_id: str,
    filename: str,
    *,
    revision: str | None = None,
    expected: str | None = None,
    cache_dir: str | Path | None = None,
    again: bool = True,
) -> Path:
    """A file of a model repository, from the Hub's cache on this machine or the Hub.

    What is in the cache under a commit id is taken without a request. A file that was damaged, on the way or on the
    disk, is never returned.

    Args:
        repo_id: `"ORG/NAME"`.
        filename: Path in the repository.
        revision: Branch, tag or commit id; the main branch by default.
        expected: sha256 that the file must have. Without one, it is checked against the hash that the Hub announced.
        cache_dir: Cache folder; huggingface_hub's own (`HF_HUB_CACHE`) by default.
        again: Whether to fetch a damaged file once more, instead of only removing it from the cache.

    Raises:
        RuntimeError: If it cannot be had, or is not what it should be; the message says what to do.

    Example:
        >>> download("timm/resnet18.a1_in1k", "config.json").name  # doctest: +SKIP
        'config.json'
    """
    path = _fetch(repo_id, filename, revision, cache_dir)
    state = _state(path, expected)
    if state == "damaged" and again and not constants.HF_HUB_OFFLINE:
        path = _fetch(repo_id, filename, revision, cache_dir, force=True)
        state = _state(path, expected)
    if state == "right":
        return path
    if state == "other":  # fetching it again would not help
        raise LoadError(
            f"{filename} of {repo_id} is not the file that was published: its sha256 is not {str(expected)[:12]}.... "
            f"Give the revision that was published, or unset ETF_ZOO_HUB_ORG if it points elsewhere."
        )
    _remove(path)
    fix = "Unset HF_HUB_OFFLINE and load it" if constants.HF_HUB_OFFLINE else "Try"
    raise LoadError(f"{filename} of {repo_id} arrived damaged, and was removed from the cache. {fix} again.")


def _fetch(repo_id: str, filename: str, revision: str | None, cache_dir: Any, force: bool = False) -> Path:
    def get() -> str:
        return hf_hub_download(
            repo_id,
            filename,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force,
            library_name="etf-zoo",
        )

    with hub_errors(repo_id):
        return Path(retry(get, rate_limited=False))


def _state(path: Path, expected: str | None) -> str:
    """`"right"`, `"damaged"`, or `"other"`: whole, as the Hub announced it, and not the expected file."""
    if expected and sha256(path) == expected:
        return "right"
    announced = path.resolve().name  # the cache names content by the hash that the Hub announced for it
    if re.fullmatch(r"[0-9a-f]{64}", announced):
        whole = sha256(path) == announced
    elif re.fullmatch(r"[0-9a-f]{40}", announced):
        content = path.read_bytes()
        whole = announced in (git_hash(content), sha1(content).hexdigest())  # some mirrors hash it as it is
    else:  # a cache without links has no such names
        whole = not expected
    if not whole:
        return "damaged"
    return "other" if expected else "right"


def check_cached(
    repo_id: str, filename: str, *, revision: str | None = None, cache_dir: str | Path | None = None
) -> None:
    """Check what another loader has just read from the Hub's cache against the hash that the Hub announced it by.

    Raises:
        RuntimeError: If it is damaged; it is then removed from the cache.
    """
    cached = try_to_load_from_cache(repo_id, filename, cache_dir=cache_dir, revision=revision)
    path = Path(cached) if isinstance(cached, str) else None
    if path is None or _state(path, None) == "right":
        return
    _remove(path)
    raise LoadError(f"{filename} of {repo_id} arrived damaged, and was removed from the cache. Load it again.")


def pin(hub_id: str, *, cache_dir: str | Path | None = None) -> str:
    """A repository's id with the commit that its name stands for now, which is logged; an id with a revision as it is.

    Args:
        hub_id: `"ORG/NAME"`, or with a revision `"ORG/NAME@REVISION"`, whose `config.json` is in the cache.
        cache_dir: Cache folder, see `download`.

    Example:
        >>> pin("timm/resnet18.a1_in1k")  # doctest: +SKIP
        'timm/resnet18.a1_in1k@491b427b45c94c7fb0e78b5474cc919aff584bbf'
    """
    repo_id, revision = hf_split(hub_id)
    cached = try_to_load_from_cache(repo_id, "config.json", cache_dir=cache_dir)
    if revision or not isinstance(cached, str):
        return hub_id
    pinned = f"{repo_id}@{Path(cached).parent.name}"
    _logger.warning("hf-hub:%s stands for hf-hub:%s now; name that to have the same again.", repo_id, pinned)
    return pinned


def _remove(path: Path) -> None:
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------- errors


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_transport(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in _HTTP_PACKAGES and not isinstance(error, HfHubHTTPError)


def retry(call: Callable[[], T], tries: int = 3, *, rate_limited: bool = True) -> T:
    """Call again what failed for reasons that pass, where the client itself does not: 5xx, 429, a broken connection.

    Args:
        call: What to do.
        tries: How often at most.
        rate_limited: Whether to wait and try again after 429, too; the client's downloads do that themselves.
    """
    for i in range(tries - 1):
        try:
            return call()
        except Exception as error:
            wait = _wait(error, 2.0**i, rate_limited)
            if wait is None:
                raise
            time.sleep(wait)
    return call()


def _wait(error: BaseException, default: float, rate_limited: bool) -> float | None:
    """Seconds after which it makes sense to try again, or None."""
    if isinstance(error, LocalEntryNotFoundError):  # the client has tried for half a minute already
        return None
    for cause in _chain(error):
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            if status == 429:
                asked = _retry_after(cause) or default
                return asked if rate_limited and asked <= _LONGEST_WAIT else None
            return default if status >= 500 else None
        if _is_transport(cause) or _is_cut_short(cause):
            return default
    return None


def _is_cut_short(error: BaseException) -> bool:
    return isinstance(error, OSError) and "Consistency check failed" in str(error)  # the client has no class for it


def _retry_after(error: HfHubHTTPError) -> float | None:
    text = error.response.headers.get("Retry-After", "")
    return float(text) if text.isdigit() else None


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn what the Hub's client raises about a repository into a RuntimeError of one line that names the fix."""
    try:
        yield
    except Exception as error:
        message = _explain(error, repo_id)
        if message is None:
            raise
        raise LoadError(message) from None


def _explain(error: BaseException, repo_id: str) -> str | None:
    for cause in _chain(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return (
                f"{repo_id} is not in the cache and HF_HUB_OFFLINE is set. Load it once with a network, or unset "
                f"HF_HUB_OFFLINE."
            )
        if isinstance(cause, LocalTokenNotFoundError):
            return f"You are not logged in to the Hub: {LOG_IN}."
        if isinstance(cause, HfHubHTTPError):
            return _explain_answer(cause, repo_id)
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return (
                f"The disk is full: {repo_id} could not be stored ({cause.strerror}). Make room, or set HF_HUB_CACHE "
                f"to a folder on another disk."
            )
        if isinstance(cause, PermissionError):
            return f"{repo_id} could not be stored: {cause}. Set HF_HUB_CACHE to a folder that you can write to."
        if _is_cut_short(cause):
            return f"A file of {repo_id} was cut short on the way. Try again."
        if _is_transport(cause):
            return f"Cannot reach {constants.ENDPOINT} for {repo_id}: {cause}. Check the network, or HF_ENDPOINT."
    return None


def _explain_answer(error: HfHubHTTPError, repo_id: str) -> str:
    status, said = error.response.status_code, _said(error)
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated: accept its terms at {constants.ENDPOINT}/{repo_id}, then {LOG_IN}."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"There is no model repository {repo_id} at {constants.ENDPOINT} that you may see. Check the name; if it "
            f"is private, {LOG_IN}."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no such revision: {said}. Its owner may have rewritten it; give one that exists."
    if isinstance(error, EntryNotFoundError):
        return f"{repo_id} lacks a file: {error.response.url}. It may not be a repository of this kind of model."
    if status == 401:
        return f"The Hub does not accept your token ({said}): {LOG_IN}."
    if status == 403:
        return (
            f"Your token may not do this with {repo_id} ({said}): take one that may, with write access for publishing, "
            f"from {constants.ENDPOINT}/settings/tokens, and {LOG_IN}."
        )
    if status == 429:
        wait = _retry_after(error)
        return f"The Hub limits your requests for now: wait {f'{wait:.0f} s' if wait else 'some minutes'}, or {LOG_IN}."
    if status >= 500:
        return f"The Hub is in trouble ({status}: {said}). Try again later."
    return f"The Hub refused a request about {repo_id} ({status}: {said})."


def _said(error: HfHubHTTPError) -> str:
    """The server's own words, in one line."""
    message: Any = error.server_message or error.response.headers.get("X-Error-Message") or "no reason given"
    return " ".join(str(message).split()).rstrip(".")
