"""The page of a run or an autopsy in a browser, as wide as a desk and as a phone: pictures, and what can be checked.

    apt-get install chromium && python -m experiments.trust.page_in_browser runs/quickstart/report.html --out=shots

Prints for each width whether the page is wider than the window, whether every picture is shown, and what the console
said; writes page_1280.png and page_390.png. Exits with 1 where something of that is wrong. Last, how long the page took
to open.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote

WIDTHS = (1280, 390)
HEIGHT = 9000
PROBE = """<script>
addEventListener("load", () => {
  document.querySelectorAll("details").forEach(part => part.open = true);
  const page = document.documentElement, pictures = [...document.images];
  const shown = pictures.filter(one => one.complete && one.naturalWidth > 0);
  parent.postMessage([innerWidth, page.scrollWidth, shown.length, pictures.length].join(" "), "*");
});
</script>"""
# A window is never narrower than 500 pixels, a frame may be.
FRAME = """<!doctype html><body style="margin: 0">
<script>addEventListener("message", event => document.title = "seen " + event.data)</script>
<iframe src="page.html" style="border: 0; width: {width}px; height: {height}px"></iframe>"""


def browser() -> str | None:
    """A Chromium, where there is one."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def look(page: Path, width: int, out: Path) -> dict[str, Any]:
    """Opens the page at that width, with all of it unfolded; writes out/page_WIDTH.png."""
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "page.html").write_text(page.read_text() + PROBE)
        Path(scratch, "frame.html").write_text(FRAME.format(width=width, height=HEIGHT))
        wanted = [f"--window-size={width},{HEIGHT}", f"--screenshot={out.resolve()}/page_{width}.png"]
        done = _run(Path(scratch), "frame.html", *wanted)
    found = re.search(r"<title>seen (\d+) (\d+) (\d+) (\d+)</title>", done.stdout)
    inner, wide, shown, pictures = map(int, found.groups()) if found else (0, 1, 0, 1)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return {
        "width": inner, "page_width": wide, "pictures": pictures, "shown": shown, "console": console,
        "fine": wide <= inner == width and shown == pictures and not console,
    }  # fmt: skip


ANSWER = """<script>addEventListener("load", () => {
  const answer = (() => { SCRIPT })();
  document.title = "answer " + encodeURIComponent(JSON.stringify(answer));
});</script>"""


def ask(page: Path, script: str) -> Any:
    """What the body of a function in JavaScript returns once the page is there."""
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "page.html").write_text(page.read_text() + ANSWER.replace("SCRIPT", script))
        done = _run(Path(scratch), "page.html", "--window-size=1280,900")
    found = re.search(r"<title>answer (.*?)</title>", done.stdout)
    if found is None:
        raise RuntimeError(f"the page gave no answer: {done.stderr[-2000:]}")
    return json.loads(unquote(found[1]))


def _run(folder: Path, name: str, *wanted: str) -> subprocess.CompletedProcess[str]:
    command = [
        str(browser()), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={folder}/profile", "--enable-logging=stderr", "--v=0", *wanted, "--dump-dom",
        (folder / name).as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def main(argv: list[str]) -> int:
    """Looks at every width."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, default=Path())
    given = parser.parse_args(argv)
    if browser() is None:
        print("no chromium found", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    seen = [look(given.page, width, given.out) for width in WIDTHS]
    for found in seen:
        print(", ".join(f"{key} {value}" for key, value in found.items()))
    opened = ask(given.page, "return Math.round(performance.now())")
    print(f"opened in {opened} ms, {given.page.stat().st_size / 1e6:.1f} MB")
    return 0 if all(found["fine"] for found in seen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
