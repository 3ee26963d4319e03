"""Start the page for trying out a trained model: `python app.py --port 7860`.

A Hugging Face Space runs this file from the root of its repository.
"""

import sys

from folio.errors import one_line_errors, report
from folio.loopback import without_proxies

try:
    with without_proxies():  # importing Gradio creates HTTP clients: an invalid proxy would fail
        from folio.app.server import main
except ModuleNotFoundError as error:
    report(f"{error.name} is not installed: `make app` installs it and starts the page")
    sys.exit(1)

if __name__ == "__main__":
    with one_line_errors():
        main()
