import folio as folio  # before a stage imports anything: see there
