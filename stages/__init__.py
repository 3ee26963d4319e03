# Imported before a stage's own sources and PyTorch: `folio` sets how Ctrl-C ends the process,
# `signals` looks up the `dvc` process that runs the stage, and its inputs are read.
import folio as folio
from folio import inputs
from folio import signals as signals

inputs.remember()
