"""Program of a process that compares mathematical answers; imports nothing of this package.

Reads one JSON list [answer, reference] per line and writes true or false; see ``math_answers``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import resource
import sys

from math_verify import parse, verify

_SECONDS = 2
_MOST_BYTES = 4 << 30
_EXPRESSION = re.compile(r"[\\+*/^=(\[]|\d[A-Za-z](?![A-Za-z])|\d:\d")
_MARKED_OR_PROSE = re.compile(r"\$|\\boxed|\\\(|\\\[|(?<![\\A-Za-z])[A-Za-z]{2,}")


def _parse(text: str) -> list[object]:
    """Parse a text; mark a bare formula as one, of which math-verify would read only a number."""
    if _EXPRESSION.search(text) and not _MARKED_OR_PROSE.search(text):
        found = parse(f"${text.strip()}$", parsing_timeout=_SECONDS)
        if found:
            return list(found)
    return list(parse(text, parsing_timeout=_SECONDS))


def is_same(answer: str, reference: str) -> bool:
    """Return whether two texts give the same answer, by math-verify; False after its time limit."""
    return bool(verify(_parse(reference), _parse(answer), timeout_seconds=_SECONDS))


def _limit_memory() -> None:
    """Limit memory, so that an exploding number raises here instead of exhausting the machine."""
    with contextlib.suppress(OSError, ValueError):  # a lower limit exists, or the system has none
        resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))


def main() -> None:
    """Reply to lines until the input ends."""
    _limit_memory()
    logging.disable()  # about timeouts, which give false
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(is_same(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
