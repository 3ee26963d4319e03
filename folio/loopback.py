"""Servers on this machine: which Host headers they accept, and calls to them without a proxy.

A malicious web page can make a browser send requests to a server on 127.0.0.1 and read the
responses, if the page's domain name is changed to resolve to 127.0.0.1 (DNS rebinding). The browser
then sends that name as the Host header, and never an IP address.
"""

import contextlib
import ipaddress
import os
import re
import socket
from collections.abc import Collection, Iterable, Iterator

from folio.errors import UserError

HOST = "127.0.0.1"  # the address that Folio's servers listen on
HINT = "use 127.0.0.1 or localhost, or allow the name with --allow-host"
_VARIABLE = "FOLIO_ALLOWED_HOSTS"  # names, separated by commas
_OURS = ("localhost", "127.0.0.1", "::1")

_NO_PROXY = ("no_proxy", "NO_PROXY")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "ws_proxy", "wss_proxy", "ftp_proxy")
_CERTIFICATES = ("ssl_cert_file", "ssl_cert_dir")


def is_allowed(
    headers: Iterable[tuple[bytes, bytes]], allowed: Collection[str], any_address: bool = False
) -> bool:
    """Whether a request's Host is a name of this machine, on any port, or one of `allowed`.

    headers: as in an ASGI scope. allowed: names from `parse_hosts`; ".example.org" stands for all
    names that end with it, and "*" for all. any_address: also allow every IP address.
    """
    hosts = [value for name, value in headers if name.lower() == b"host"]
    name = _name(hosts[0].decode("latin-1")) if len(hosts) == 1 else None
    if name is None:
        return False
    if is_address(name) and (any_address or ipaddress.ip_address(name).is_loopback):
        return True
    return (
        name == "localhost"
        or bool({"*", name} & set(allowed))
        or any(name.endswith(each) for each in allowed if each.startswith("."))
    )


def is_address(name: str) -> bool:
    """Whether a name is an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def parse_hosts(names: Iterable[str]) -> list[str]:
    """The names that a user allows, by option or by the environment variable FOLIO_ALLOWED_HOSTS.

    "*.example.org" becomes ".example.org". Raises UserError for anything that is not a host name.
    """
    found = []
    for text in [*names, *filter(None, os.environ.get(_VARIABLE, "").split(","))]:
        name = text.strip().lower().strip("[]").removesuffix(".")
        if not (is_address(name) or re.fullmatch(r"\*|(\*?\.)?[a-z0-9_][a-z0-9_.-]*", name)):
            raise UserError(
                f"{text[:100]!r} is not a host name: give a name without a port, such as"
                " box.example.org"
            )
        found.append(name.removeprefix("*") or "*")
    return found


def check_port(port: int) -> None:
    """Raise UserError if a server cannot listen on this port of HOST."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"port {port}: {error.strerror}; choose another --port") from None


def bypass_proxies() -> None:
    """Make this process, and those that it starts, connect to this machine without a proxy."""
    if not any(name.lower() in _PROXIES for name in os.environ):
        return
    current = next((os.environ[name] for name in _NO_PROXY if os.environ.get(name)), "")
    if current.strip() == "*":
        return
    names = [name.strip() for name in current.split(",") if name.strip()]
    value = ",".join(names + [name for name in _OURS if name not in names])
    os.environ.update(dict.fromkeys(_NO_PROXY, value))


@contextlib.contextmanager
def without_proxies() -> Iterator[None]:
    """Unset proxies and certificates in the block: even an unused HTTP client fails if one of them
    is invalid."""
    names = [name for name in os.environ if name.lower() in (*_PROXIES, "no_proxy", *_CERTIFICATES)]
    unset = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(unset)


def _name(host: str) -> str | None:
    """The name or address in a Host header, in lower case; None if the header is invalid."""
    parts = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9_.-]+))(?::\d{1,5})?", host.lower())
    if not parts:
        return None
    return parts[1] if parts[1] else parts[2].removesuffix(".") or None
