"""Makes the tables of docs/http_api.md anew from the code.

python scripts/http_api.py          writes them
python scripts/http_api.py --check  fails when they are not up to date
"""

from __future__ import annotations

import sys
from pathlib import Path

from pellucid.server.reference import updated

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "http_api.md"


def main(arguments: list[str]) -> int:
    """0 when the document is up to date, or was written."""
    found = DOCUMENT.read_text(encoding="utf-8")
    made = updated(found)
    if "--check" not in arguments:
        DOCUMENT.write_text(made, encoding="utf-8")
        return 0
    if made != found:
        print("docs/http_api.md is not up to date: run python scripts/http_api.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
