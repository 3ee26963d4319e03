"""Folio trains GPT-2 language models from scratch, as a tracked and reproducible pipeline.

Importing this package makes Ctrl-C end a command without a traceback, even while the command is
still importing PyTorch and MLflow, and sets LOGNAME and HOME if they are missing (folio/user.py).
For a command, it also pauses Python's garbage collector during the imports and at the exit.
"""

import atexit
import gc
import signal
import sys

from folio import user as user

if sys.argv[0] == "-m":  # Python is still locating the module to run
    # PyTorch and MLflow create 600,000 objects that are no garbage. Examining them again and again
    # takes a fifth of the imports' time; at the exit, it takes almost as long as importing them.
    gc.disable()  # until errors.one_line_errors
    atexit.register(gc.freeze)
    # If the shell started this command in the background with SIGINT ignored, it stays ignored.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until errors.one_line_errors handles it
