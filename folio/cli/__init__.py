"""The command line, `python -m folio`: a module per command.

The modules import PyTorch, MLflow and the rooms that use them inside their functions: importing
both takes several seconds, and `python -m folio --help` should not.
"""
