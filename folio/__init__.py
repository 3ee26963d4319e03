"""Ctrl-C while a command still imports PyTorch and MLflow ends it without a traceback."""

import signal
import sys

if sys.argv[0] == "-m":  # Python has not found the module yet that it is to run
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until errors.one_line_errors listens
