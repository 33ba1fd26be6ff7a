"""Pages of results: what a command generates is replaced each time, what people wrote around it stays."""

from pathlib import Path
from typing import Any

BEGIN, END = "<!-- generated: replaced by the next run -->", "<!-- end of what is generated -->"


def write(page: Path, generated: str) -> None:
    """Put ``generated`` (Markdown) between the two marks of a page. A page without them gets them, at its end.

    What stands before and after the marks is a person's and is never touched.
    """
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        before, after = old and old.rstrip("\n") + "\n\n", "\n"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f"{before}{BEGIN}\n{generated.strip()}\n{END}{after}", encoding="utf-8")


def measured_on(header: dict[str, Any]) -> str:
    """Hardware, versions and commit in a sentence, from ``metrics.environment()``; the load average where it was noted."""
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items() if version)
    load = f"; load average {header['load_average']:.1f}" if "load_average" in header else ""
    return (
        f"{header['processor']}, {header['cores']} cores, {header['memory_bytes'] / 2**30:.0f} GiB; {header['os']};"
        f" Python {header['python']}; {versions}; commit {header['commit']}{load}."
    )
