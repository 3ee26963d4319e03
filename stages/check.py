"""The check stage: checks params.yaml before DVC removes the outs of a stage that depends on it."""

from pathlib import Path

from folio import files, inputs, params, sections
from folio.errors import one_line_errors

OUT = Path("data/params.ok")  # its content never changes, so it does not trigger other stages


def main() -> None:
    with params.naming_way_back():
        _check()
    files.write_text(OUT, "every section of params.yaml is valid\n")
    inputs.check()


def _check() -> None:
    loaded = sections.check(params.read(params.FILE), str(params.FILE))
    sections.check_inputs(loaded)
    runtime = loaded["runtime"]
    if runtime.processes not in ("auto", 1) and runtime.device != "cpu":
        from folio import launch  # importing PyTorch takes two seconds

        launch.check_gpus(runtime.processes)


if __name__ == "__main__":
    with one_line_errors():
        main()
