# Before a stage imports PyTorch: how Ctrl-C ends it, and which dvc runs it.
import folio as folio
from folio import signals as signals
