"""The check stage: checks params.yaml before DVC removes the outs of a stage that depends on it."""

from pathlib import Path

from folio import files, inputs, params, sections
from folio.errors import one_line_errors

OUT = Path("data/params.ok")  # its content never changes, so it does not trigger other stages


def main() -> None:
    sections.check(params.read(params.FILE), str(params.FILE))
    files.write_text(OUT, "every section of params.yaml is valid\n")
    inputs.check()


if __name__ == "__main__":
    with one_line_errors():
        main()
