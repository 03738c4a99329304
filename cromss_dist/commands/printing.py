"""What the commands print: tables for people, JSON for scripts.

Layer 4.
"""

import json
import sys
from collections.abc import Sequence

REF_HELP = "name@alias or name/version, e.g. cromss-resnet50-s2@candidate"


def print_json(content: object) -> None:
    """One JSON document on stdout."""
    print(json.dumps(content, indent=2))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], empty: str = "") -> None:
    """A table on stdout; `empty` instead, where there are no rows."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        print(empty)
        return
    # Text: names and tags are not rich's markup.
    table = Table(title=Text(shown(title)), show_header=any(header), title_justify="left")
    for name in header:
        table.add_column(Text(shown(name)))
    for row in rows:
        table.add_row(*(Text(shown(cell)) for cell in row))
    # A pipe has no width: nothing must be cut there.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def shown(text: str) -> str:
    """With what steers a terminal spelt out: some of what is shown anyone may have written."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
