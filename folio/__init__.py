"""Folio trains GPT-2 language models from scratch, as a tracked and reproducible pipeline.

Importing this package makes Ctrl-C end a command without a traceback, even while the command is
still importing PyTorch and MLflow, and sets LOGNAME and HOME if they are missing (folio/user.py).
"""

import signal
import sys

from folio import user as user

# sys.argv[0] is "-m" while Python is still locating the module to run. If the shell started this
# command in the background with SIGINT ignored, SIGINT stays ignored.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until errors.one_line_errors sets its handler
