# Imported before a stage imports PyTorch: `folio` sets how Ctrl-C ends the process, and `signals`
# looks up the `dvc` process that runs the stage.
import folio as folio
from folio import signals as signals
