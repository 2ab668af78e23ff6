"""What W&B is told on this machine: its mode, and whether there is a key. Imports no wandb, which takes a second."""

from __future__ import annotations

import configparser
import contextlib
import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

_HOSTS = {"api.wandb.ai", "api.forge.coreweave.com"}
"""W&B's own servers, where no other is set."""
_ONLINE = ("online", "run", "shared")


def mode() -> str | None:
    """Return ``online``, ``offline`` or ``disabled`` as the environment or W&B's settings say, or ``None``."""
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        return "disabled"
    said = setting("mode")
    if said is None:
        return None
    return "disabled" if said == "disabled" else "online" if said in _ONLINE else "offline"


def wanted() -> str:
    """Return the mode: as it is said, or else ``online`` where there is a key and ``offline`` where there is none."""
    return mode() or ("online" if has_key() else "offline")


def has_key() -> bool:
    """Return whether W&B's library finds a key for its server."""
    if setting("api_key") or setting("identity_token_file"):
        return True
    server = setting("base_url")
    hosts = {urlsplit(server).netloc} if server else _HOSTS
    places = [Path("~/.netrc"), Path("~/_netrc")]
    if os.environ.get("NETRC"):
        places = [Path(os.environ["NETRC"])]
    for place in places:
        with contextlib.suppress(OSError, netrc.NetrcParseError, RuntimeError):
            known = netrc.netrc(str(place.expanduser()))
            if any(known.authenticators(host) for host in hosts):
                return True
    return False


def setting(name: str) -> str | None:
    """Return a setting: the environment's, this folder's, or the user's."""
    if said := os.environ.get(f"WANDB_{name.upper()}"):
        return said
    here = Path(os.environ.get("WANDB_DIR") or ".") / "wandb"
    user = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb")
    for folder in (here, user):
        read = configparser.ConfigParser(default_section="default", interpolation=None)
        with contextlib.suppress(OSError, configparser.Error, RuntimeError, UnicodeDecodeError):
            read.read(folder.expanduser() / "settings")
            if found := read.defaults().get(name):
                return found
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of what went wrong, without its full stop."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    # the library's own words for a server that is silent are that its own process is busy
    return "the server does not answer" if "did not respond in time" in line else line.rstrip(".")
