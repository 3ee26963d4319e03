"""The name and the home folder of the user, without which DVC and MLflow fail.

In a container, the user id may have no entry in /etc/passwd. Then they can only come
from the environment, which may not have them either.
"""

import os
import pwd

_NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")  # where getpass.getuser looks, in this order


def complete_environment() -> dict[str, str]:
    """Set LOGNAME and HOME if the system does not have them. Returns the variables it has set."""
    try:
        pwd.getpwuid(os.getuid())
        return {}
    except KeyError:
        defaults = {"LOGNAME": str(os.getuid())} if not any(map(os.environ.get, _NAMES)) else {}
        defaults |= {} if os.environ.get("HOME") else {"HOME": "/"}  # as Docker does
        os.environ.update(defaults)
        return defaults


# For this process and those that it starts. A `dvc` that the user starts needs them as well.
COMPLETED = complete_environment()
