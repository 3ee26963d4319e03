# Before a stage imports PyTorch: what Ctrl-C does, and which dvc runs it.
import folio as folio
from folio import stopping as stopping
