"""The command line, `python -m folio`, with one module per command.

The modules import PyTorch, MLflow and everything that uses them inside functions: these imports
take several seconds, which would slow down `python -m folio --help`.
"""
