"""Start the page for trying a trained model: `python app.py --port 7860`.

A Hugging Face Space runs this file from the root of its repository.
"""

from folio.app.server import main
from folio.errors import one_line_errors

if __name__ == "__main__":
    with one_line_errors():
        main()
