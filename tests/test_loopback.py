"""Which Host headers a server on this machine answers, and proxies that do not concern it."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from conftest import ROOT, environment

from folio import loopback
from folio.errors import UserError

PROXIES = {
    "http": "http://127.0.0.1:9",  # nothing listens there
    "socks": "socks5://127.0.0.1:9",
    "unknown scheme": "foo://bar",
    "not a URL": ":::",
    "with a password": "http://ada:secret@127.0.0.1:9/",
}
VARIABLES = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def allowed(host: str | bytes, names: tuple[str, ...] = (), any_address: bool = False) -> bool:
    value = host if isinstance(host, bytes) else host.encode()
    return loopback.is_allowed([(b"accept", b"*"), (b"host", value)], names, any_address)


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:7860", "LOCALHOST:1", "localhost.", "127.0.0.1", "127.0.0.1:65535",
     "127.8.9.1", "[::1]", "[::1]:5001", "[0:0:0:0:0:0:0:1]:80"],
)  # fmt: skip
def test_names_of_this_machine_are_allowed_on_any_port(host):
    assert allowed(host)


@pytest.mark.parametrize(
    "host",
    ["", "evil.example", "evil.example:7860", "localhost.evil.example", "127.0.0.1.evil.example",
     "10.evil.example", "192.168.evil.example", "172.16.evil.example:80", "evil.localhost.example",
     "127.0.0.1.nip.io", "localhost:evil", "localhost:", "localhost:1:2", "evil@localhost",
     "localhost@evil.example", "localhost/evil", "localhost evil", " localhost", "localhost,evil",
     "[::1].evil.example", "[::1", "::1", "[evil]", "[::2]:80", "0.0.0.0", "192.168.1.5", "127.1",
     "2130706433", "0x7f000001", "127.0.0.1\x00", "loc\xe4lhost", ".", ".localhost", "*"],
)  # fmt: skip
def test_every_other_host_is_refused(host):
    assert not allowed(host)


def test_request_needs_exactly_one_host():
    assert not loopback.is_allowed([], ())
    twice = [(b"host", b"localhost"), (b"Host", b"evil.example")]
    assert not loopback.is_allowed(twice, ()) and not loopback.is_allowed(twice[::-1], ())
    assert not loopback.is_allowed([(b"host", b"localhost")] * 2, ())


@pytest.mark.parametrize(
    ("names", "host", "expected"),
    [
        (("box.example",), "box.example:80", True),
        (("box.example",), "BOX.example", True),
        (("box.example",), "a.box.example", False),
        (("box.example",), "xbox.example", False),
        ((".box.example",), "a.b.box.example", True),
        ((".box.example",), "box.example", False),
        ((".box.example",), "xbox.example", False),
        (("192.168.1.5",), "192.168.1.5:80", True),
        (("192.168.1.5",), "192.168.1.6", False),
        (("::2",), "[::2]:80", True),
        (("*",), "anything.example", True),
        (("*",), "", False),
        (("",), "evil.example", False),
    ],
)
def test_names_that_the_user_allows_are_allowed(names, host, expected):
    assert allowed(host, names) == expected


def test_any_address_allows_addresses_but_no_names():
    assert allowed("10.1.2.3:7860", any_address=True) and allowed("[fe80::1]", any_address=True)
    assert not allowed("10.evil.example", any_address=True)


def test_parse_hosts_reads_names_of_options_and_of_the_variable(monkeypatch):
    assert loopback.parse_hosts([]) == []
    monkeypatch.setenv("FOLIO_ALLOWED_HOSTS", " box.example,,*.Other.example ")
    names = ["A.example.", "192.168.1.5", "[::2]", "*", ".x.y"]
    expected = ["a.example", "192.168.1.5", "::2", "*", ".x.y", "box.example", ".other.example"]
    assert loopback.parse_hosts(names) == expected
    assert loopback.parse_hosts(expected) == [*expected, *expected[-2:]]


@pytest.mark.parametrize(
    "name",
    ["", " ", "http://box.example", "box.example:80", "box example", "a/b", "*x", "**", "-x",
     "b\xf6x", "box.example\n\x1b", "x" * 5_000 + "/"],
)  # fmt: skip
def test_parse_hosts_reports_anything_else_in_one_line(name):
    with pytest.raises(UserError, match=r"is not a host name: give a name without a port") as error:
        loopback.parse_hosts([name])
    assert str(error.value).isprintable() and len(str(error.value)) < 300


# --- proxies


@pytest.fixture
def clean(monkeypatch) -> pytest.MonkeyPatch:
    for name in [*os.environ]:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, "localhost,127.0.0.1,::1"),
        ({"NO_PROXY": "corp.example, 10.0.0.1"}, "corp.example,10.0.0.1,localhost,127.0.0.1,::1"),
        ({"no_proxy": "a", "NO_PROXY": "b"}, "a,localhost,127.0.0.1,::1"),
        ({"no_proxy": "127.0.0.1"}, "127.0.0.1,localhost,::1"),
        ({"no_proxy": "", "NO_PROXY": "b"}, "b,localhost,127.0.0.1,::1"),
    ],
)
def test_bypass_proxies_adds_this_machine_to_the_exceptions(clean, before, after):
    for name, value in ({"HTTP_PROXY": "http://x"} | before).items():
        clean.setenv(name, value)
    clean.setenv("no_proxy", os.environ.get("no_proxy", ""))  # restored at the end
    clean.setenv("NO_PROXY", os.environ.get("NO_PROXY", ""))
    for _ in range(2):
        loopback.bypass_proxies()
        assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == after


def test_bypass_proxies_changes_nothing_without_a_proxy_or_with_no_proxy_for_all(clean):
    before = dict(os.environ)
    loopback.bypass_proxies()
    clean.setenv("ALL_PROXY", "http://x")
    clean.setenv("no_proxy", "*")
    loopback.bypass_proxies()
    assert dict(os.environ) == before | {"ALL_PROXY": "http://x", "no_proxy": "*"}


def test_without_proxies_unsets_them_in_the_block_only(clean):
    names = (*VARIABLES, "No_Proxy", "SSL_CERT_FILE", "SSL_CERT_DIR")
    for name in names:
        clean.setenv(name, "http://x")
    before = dict(os.environ)
    with contextlib.suppress(KeyError), loopback.without_proxies():
        assert not os.environ.keys() & {*names}
        raise KeyError
    assert dict(os.environ) == before


@pytest.fixture(scope="module")
def address():
    """The address of a server that answers 200."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # the name that BaseHTTPRequestHandler calls
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


MLFLOW_CALLS = """
import importlib, json, os, sys
import folio.tracking
from mlflow.utils.credentials import MlflowHostCreds
from mlflow.utils.rest_utils import http_request

addresses, environments = json.loads(sys.argv[1])
for environment in environments:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]
    os.environ.update(environment)
    importlib.reload(folio.tracking)
    for address in addresses:
        print(http_request(MlflowHostCreds(address), "/x", "GET").status_code)
"""


def test_mlflow_reaches_a_store_on_this_machine_whatever_the_proxy(address):
    addresses = [address, address.replace("127.0.0.1", "localhost")]
    environments = [dict.fromkeys(VARIABLES, proxy) for proxy in PROXIES.values()]
    environments += [{name: PROXIES["http"]} for name in VARIABLES]
    done = subprocess.run(
        [sys.executable, "-c", MLFLOW_CALLS, json.dumps([addresses, environments])],
        cwd=ROOT, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    expected = ["200"] * len(addresses) * len(environments)
    assert done.stdout.split() == expected, done.stderr
