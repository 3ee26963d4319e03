"""Start the page for trying out a trained model: `python app.py --port 7860`.

A Hugging Face Space runs this file from the root of its repository.
"""

from folio.errors import one_line_errors
from folio.loopback import without_proxies

with without_proxies():  # importing Gradio creates HTTP clients, which fail for an invalid proxy
    from folio.app.server import main

if __name__ == "__main__":
    with one_line_errors():
        main()
