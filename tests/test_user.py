"""A user id that has no entry in /etc/passwd, as in some containers."""

import os
import pwd

import pytest

from folio import user

NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")


@pytest.fixture
def unnamed(monkeypatch):
    """The system does not know the user, and neither does the environment."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in (*NAMES, "HOME"):
        monkeypatch.setenv(name, "")  # restores the variable after the test
        monkeypatch.delenv(name)
    return monkeypatch


def test_missing_name_and_home_are_set(unnamed):
    assert user.complete_environment() == {"LOGNAME": str(os.getuid()), "HOME": "/"}
    assert user.complete_environment() == {}


@pytest.mark.parametrize("name", NAMES)
def test_name_in_the_environment_is_kept(unnamed, name):
    unnamed.setenv(name, "ada")
    assert user.complete_environment() == {"HOME": "/"}


def test_known_user_needs_no_variables(monkeypatch):
    for name in (*NAMES, "HOME"):
        monkeypatch.delenv(name, raising=False)
    assert user.complete_environment() == {}
    assert "LOGNAME" not in os.environ
