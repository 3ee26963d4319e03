"""Injects a fault into a stage: benchmarks/project.py copies this file to sitecustomize.py.

Python imports sitecustomize at the start of every process. In the stage that FOLIO_FAULT specifies,
this module counts the matching lines that a function is about to run, and acts on one of them.
Folio itself needs no code for this. FOLIO_FAULT has the form stage|end of the file's path|function|
part of the line|number of the match|action. Any action other than a kill slows the process down
until the file ../continue exists.
"""

import linecache
import os
import signal
import sys
import threading
import time
from pathlib import Path

stage, file, function, part, number, action = os.environ.get("FOLIO_FAULT", "|||||").split("|")
lines = 0  # that matched


def on_line(frame, event, _):
    global lines
    if event == "line" and part in linecache.getline(frame.f_code.co_filename, frame.f_lineno):
        lines += 1
        if lines == int(number):
            Path("../reached").write_text(f"{os.getpid()}\n")
            if action == "kill the stage":
                os.kill(os.getpid(), signal.SIGKILL)
            if action == "kill the group":
                os.killpg(0, signal.SIGKILL)
        if lines >= int(number) and not Path("../continue").exists():
            time.sleep(0.05)
    return on_line


def on_call(frame, *_):
    code = frame.f_code
    if function.startswith("RunWriter.") and code.co_qualname == "TrainStep.__call__":
        time.sleep(0.2)  # MLflow's thread takes seconds to start, as long as a whole training
    return on_line if code.co_qualname == function and code.co_filename.endswith(file) else None


if stage and sys.orig_argv[-1] == f"stages.{stage}":
    threading.settrace(on_call)
    sys.settrace(on_call)
