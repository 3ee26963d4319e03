import folio as folio  # for what it does to Ctrl-C, before a stage imports PyTorch
