"""Takes the README's two pictures of the dashboard, from the runs of `make demo`.

    python -m tests.dashboard.pictures runs examples

Serves the page as `stabnorm view` does and photographs it in a headless Chromium, 1280 pixels wide: the unstable run in
the light theme, the switched one in the dark theme.
"""

import argparse
import threading
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from stabnorm.dashboard.answers import Answers
from stabnorm.dashboard.view import serve
from tests.dashboard.browser import Browser

PICTURES = (("tab_unstable.png", "unstable", "", False), ("tab_switched.png", "switched", "", True))


def main(arguments: Sequence[str] | None = None) -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", help="what `make demo` wrote")
    parser.add_argument("target", help="the folder of the pictures")
    options = parser.parse_args(arguments)
    answers = Answers({"": Path(options.runs)})
    answers.refresh()
    names = [run.name for run in answers.runs()]
    with serve(options.runs, port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for file, run, state, dark in PICTURES:
            name = next(name for name in names if name.startswith(run))
            with Browser(1280, 1000 if dark else 860, dark=dark) as browser:
                browser.go(f"http://127.0.0.1:{server.server_port}/#run={name}{state}")
                browser.wait_for("document.body.dataset.drawn")
                browser.picture(path := Path(options.target) / file)
            with Image.open(path) as picture:  # a third of the bytes
                # The default would give small marks the colour of something else.
                small = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
                small.save(path, optimize=True)
        server.shutdown()


if __name__ == "__main__":
    main()
