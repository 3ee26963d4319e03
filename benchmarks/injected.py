"""What benchmarks/project.py puts on a project's path as sitecustomize.py.

Python runs that first in every process. In one stage it counts the lines that one function is about
to run, and at one of them does the deed: so no line of the product knows of it. FOLIO_FAULT is
stage|end of the file's path|function|a word of the line|the how manieth|deed; a deed that is no
kill is to be slow until the file ../go is there.
"""

import linecache
import os
import signal
import sys
import threading
import time
from pathlib import Path

stage, file, function, word, count, deed = os.environ.get("FOLIO_FAULT", "|||||").split("|")
passed = 0


def on_line(frame, event, _):
    global passed
    if event == "line" and word in linecache.getline(frame.f_code.co_filename, frame.f_lineno):
        passed += 1
        if passed == int(count):
            Path("../reached").write_text(f"{os.getpid()}\n")
            if deed == "kill the stage":
                os.kill(os.getpid(), signal.SIGKILL)
            if deed == "kill the group":
                os.killpg(0, signal.SIGKILL)
        if passed >= int(count) and not Path("../go").exists():  # the deed is to be slow
            time.sleep(0.05)
    return on_line


def on_call(frame, *_):
    code = frame.f_code
    if function in ("Store.send", "Store._open") and code.co_qualname == "Step.__call__":
        time.sleep(0.2)  # MLflow's thread takes seconds to begin: as many steps as a training has
    return on_line if code.co_qualname == function and code.co_filename.endswith(file) else None


if stage and sys.orig_argv[-1] == f"stages.{stage}":
    threading.settrace(on_call)
    sys.settrace(on_call)
