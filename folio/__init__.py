"""Ctrl-C while a command still imports PyTorch and MLflow ends it without a traceback."""

import signal
import sys

# "-m": Python has not found the module yet that it is to run. A shell's background job that is to
# ignore Ctrl-C goes on ignoring it.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until errors.one_line_errors listens
