"""Folders to the Hub in one commit and back; `huggingface_hub` does the transfer. It is imported where it is used."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bench.errors import BenchError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Kind = Literal["model", "dataset"]
"""Types of repositories: a plugin is a ``model``, a study a ``dataset``."""
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class HubError(BenchError):
    """The Hub does not have, or does not take, what was asked for."""


class NoSuchRepo(HubError):
    """There is no repository of that name and type, or this account may not see it."""


@dataclass(frozen=True)
class Pushed:
    """What became of a push.

    Attributes
    ----------
    url
        Page of the repository.
    commit
        Its commit, which ``revision`` of a pull takes.
    private
        Whether only this account sees it.
    """

    url: str
    commit: str
    private: bool


def is_repo(name: str) -> bool:
    """Return whether ``name`` can be that of a repository, ``USER/NAME``."""
    return bool(_REPO.fullmatch(name)) and ".." not in name and "--" not in name


def check_repo(name: str) -> None:
    """Raise ``HubError`` unless ``name`` can be that of a repository."""
    if not is_repo(name):
        raise HubError(
            f"'{name}' is no repository of the Hub: expected USER/NAME, of letters, digits, '-', '_' and '.'"
        )


def upload(
    folder: Path,
    repo: str,
    kind: Kind,
    *,
    private: bool,
    message: str,
    stale: Sequence[str] = (),
    token: str | None = None,
) -> Pushed:
    """Put the files of a folder into a repository, which is made if there is none, in one commit: all or nothing.

    A push that was broken off is done again as a whole; what the Hub has of large files is not sent twice. Files that
    the repository has beside these stay, but for those that would be ``stale``.

    Parameters
    ----------
    folder
        What to send.
    repo, kind
        Where to.
    private
        Whether a repository that is made now is; one that is there stays as it is.
    message
        Of the commit.
    stale
        Paths that are removed where the folder does not have them.
    token
        By default ``HF_TOKEN``, or that of ``hf auth login``.

    Raises
    ------
    HubError
        If there is no token, or no right to write, or the Hub cannot be reached.
    """
    check_repo(repo)
    api = _api(token)
    if not (token or _known_token()):
        raise HubError(
            "no token of the Hugging Face Hub is known: `hf auth login` keeps one, or set HF_TOKEN to one that may "
            "write"
        )
    with _asking(repo, "take"):
        page = api.create_repo(repo, repo_type=kind, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            repo_type=kind,
            commit_message=message,
            delete_patterns=list(stale) or None,
        )
        info = api.repo_info(repo, repo_type=kind)
    return Pushed(str(page), str(commit.oid), bool(info.private))


def download(
    repo: str,
    kind: Kind,
    wanted: Sequence[str],
    *,
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """Fetch the wanted files of a repository, and no others, into the Hub's cache; return their folder.

    Offline, or where the Hub does not answer, what an earlier call fetched is used.

    Parameters
    ----------
    repo, kind
        Where from.
    wanted
        Paths in the repository, or patterns of them.
    revision
        Branch, tag or commit.
    token
        As for `upload`.

    Raises
    ------
    NoSuchRepo
        If there is none.
    HubError
        If the revision is missing, the Hub cannot be reached, or a path leads out of the repository.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    check_repo(repo)
    api = _api(token)

    def fetch(local_files_only: bool) -> Path:
        found = snapshot_download(
            repo,
            repo_type=kind,
            revision=revision,
            allow_patterns=list(wanted),
            local_files_only=local_files_only,
            token=token,
        )
        return Path(found)

    try:
        with _asking(repo, "give", revision):
            # not `list_repo_files`, which would ask a Hub that is away again and again
            info: Any = api.repo_info(repo, repo_type=kind, revision=revision)
            for file in info.siblings or []:
                _check_inside(file.rfilename, repo)
            return fetch(local_files_only=False)
    except Unreached as problem:
        try:
            return fetch(local_files_only=True)
        except LocalEntryNotFoundError:
            raise HubError(f"{problem}, and nothing of it was fetched before") from None


class Unreached(HubError):
    """The Hub cannot be asked."""


def _check_inside(path: str, repo: str) -> None:
    """Raise ``HubError`` if a path leads out of the repository; nothing of such a one is fetched."""
    if path.startswith(("/", "~")) or "\\" in path or ":" in path or "\0" in path or ".." in path.split("/"):
        raise HubError(f"{repo} has a file named {path!r}, which leads out of it; nothing was fetched")


def _api(token: str | None) -> HfApi:
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from bench import __version__

    disable_progress_bars()
    return HfApi(token=token, library_name="variator-bench", library_version=__version__)


def _known_token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


@contextmanager
def _asking(repo: str, verb: str, revision: str | None = None) -> Iterator[None]:
    """Turn what the library raises into an error that says what was wrong and what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def no(why: str) -> str:
        return f"the Hub does not {verb} {repo}: {why}"

    try:
        yield
    except OfflineModeIsEnabled:
        raise Unreached(no("HF_HUB_OFFLINE is set")) from None
    except GatedRepoError:
        raise HubError(no("its owner must let you in; ask on its page")) from None
    except RepositoryNotFoundError as error:
        why = "there is none of that name, or this account may not see it"
        if error.response is not None and error.response.status_code == 401:
            why = "there is none of that name, or it is private and needs a token (HF_TOKEN, or `hf auth login`)"
        raise NoSuchRepo(no(why)) from None
    except RevisionNotFoundError:
        raise HubError(no(f"it has no revision '{revision}'")) from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status == 401:
            raise HubError(no("it does not know the token; `hf auth login` again, or correct HF_TOKEN")) from None
        if status == 403:
            raise HubError(no("the token has no right to that; it must be one that may write there")) from None
        if status >= 500:
            raise Unreached(no(f"it answers with an error of its own ({status}); try again later")) from None
        raise HubError(no((error.server_message or str(error)).strip().splitlines()[0])) from None
    except HFValidationError as error:
        raise HubError(f"'{repo}' is no repository of the Hub: {str(error).splitlines()[0]}") from None
    except LocalEntryNotFoundError as error:
        raise Unreached(no("it cannot be reached")) from error
    except Exception as error:
        # whichever library it asks with, which changed
        if type(error).__module__.split(".")[0].startswith(("httpx", "httpcore", "requests")) or isinstance(
            error, ConnectionError | TimeoutError
        ):
            raise Unreached(no(f"it cannot be reached ({type(error).__name__})")) from error
        raise
