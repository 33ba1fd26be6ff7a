"""Pages in a browser without a window, for tests of what people see."""

import shutil
import subprocess
from html import escape

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

needs_browser = pytest.mark.skipif(not CHROMIUM, reason="needs a browser: apt install chromium")


def browse(page, *flags):
    """Open a file in a browser, which ends by itself; return what it wrote.

    Args:
        page: the path of an HTML file. The browser's profile lies beside it.
        flags: what the browser does, such as ``--dump-dom``.
    """
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu",
        f"--user-data-dir={page.parent / 'profile'}", *flags, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done


def dom_with_frames(tmp_path, page, widths, script):
    """Show a page in frames and run a script beside them; return the document it leaves.

    Args:
        tmp_path: where files go.
        page: HTML.
        widths: of the frames, in pixels.
        script: JavaScript that runs when all frames are loaded.
    """
    source = escape(page, quote=True)
    frames = [
        f'<iframe width="{width}" height="900" srcdoc="{source}"></iframe>' for width in widths
    ]
    harness = tmp_path / "harness.html"
    harness.write_text(f"<!doctype html><body>{''.join(frames)}<script>{script}</script>")
    return browse(harness, "--virtual-time-budget=5000", "--dump-dom").stdout
