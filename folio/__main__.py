import gc

from folio.cli.main import main

if __name__ == "__main__":
    # A command imports PyTorch or MLflow only once it runs: see folio/__init__.py. What garbage
    # there can be in between, at most this number of objects, takes little memory.
    gc.set_threshold(400_000)
    main()
