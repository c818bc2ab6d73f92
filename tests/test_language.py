"""Language of docstrings and pages: plain technical English, the field's words.

Frozen here: a docstring's summary names the thing or the action and does not begin with a question
word or a pronoun; docstrings, comments and pages use the field's terms. Exceptions are listed with
the place where the word has its ordinary meaning.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("okd_lightning", "callbacks", "benchmarks", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))

OPENINGS = re.compile(
    r"(What|Who|Whose|Where|How|When|Which|Whether|The same|Nothing|It|Its|They|That|Those|"
    r"There|Also|As|Of)\b"
)
WORDS = {
    r"\banew\b": "again",
    r"\bwithout a word\b": "silently",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bput(s|ting)? back\b": "restore",
    r"\bdeal(s|ing)? out\b|\bdealt out\b": "distribute",
    r"\bmuted?\b": "fully masked",
    r"\bgiven (responses?|stories|answers?)\b": "dataset responses",
    r"\bown (responses?|rollouts|stories|answers?)\b": "on-policy samples, on-policy responses",
    r"(?<!--)\bcredits?\b": "advantage",
    r"\bbehind\b": "after",
    r"\bbeside\b": "besides, next to, with",
    r"\basked? (once|again|every time)\b": "name the action: query, request",
    r"\bstands? for\b": "represents, is",
    r"\bstands? (on|in)\b": "is at; replaces",
    r"\blaws?\b(?!:)": "distribution",
    r"\bcoins?\b": "random draw",
    r"\b(drawn|drew) tokens?\b": "sampled token",
    r"\b(own|given) (forward|reverse) kl\b": "on-policy KL; KL on dataset responses",
    r"\brescue[sd]?\b": "correct, prevent",
    r"\bat hand\b": "available",
    r"\b(nats|bytes|seconds|s|tokens|rows|rollouts|GiB) an? (token|step|response|row|device"
    r"|character|byte)\b": "per: nats per token",
    r"\bwhoever\b": "name the reader or the caller",
    r"\b(one|number|rows|ids|reward|response) an? (token|step|response|row|prompt|rank|line|file"
    r"|epoch|byte|letter|method|model|position|tile)\b(?! (is|are|has|that)\b)": "per",
}
ALLOWED: set[tuple[str, str]] = {
    # ``credit`` and ``credits`` are names in the code
    (
        "tests/callbacks/methods/test_policy_gradient.py",
        "-Σ ρ A / count, one row at a time; ``credit(log_p, log_q, drawn)`` of [tokens, vocab].",
    ),
    ("tests/callbacks/test_shelf_formulas.py", "-ρ A with A = credit(log p, log q, drawn)."),
    ("tests/test_language.py", "# ``credit`` and ``credits`` are names in the code"),
    (
        "okd_lightning/rollouts/scoring.py",
        "credits: One advantage per response, by the term's name.",
    ),
    (
        "okd_lightning/losses/sampled.py",
        "credit: [positions] the advantage A; detached here.",
    ),
    (
        "okd_lightning/losses/terms.py",
        "credits: [positions] for each reward term: the advantage of each position's row.",
    ),
    (
        "okd_lightning/advantages/base.py",
        "def credit(self, student_logprobs, teacher_logprobs, mask, state_value=None):",
    ),
    (
        "okd_lightning/advantages/checking.py",
        "ConfigError: It is none of those, or ``credit`` returns no detached, finite Tensor of the",
    ),
    (
        "okd_lightning/advantages/f_divergence.py",
        "Return the advantages, [rows, tokens] nats; see ``Advantage.credit``.",
    ),
    (
        "okd_lightning/records/batches.py",
        "credits: The response's advantage in each reward term, by the term's name.",
    ),
    (
        "okd_lightning/records/batches.py",
        "credits: [batch] advantage of each reward term, by its name; 0 on rows without one.",
    ),
    (
        "okd_lightning/records/collation.py",
        "credits: The response's advantage in each reward term, by the term's name.",
    ),
    (
        "okd_lightning/records/collation.py",
        "credits: One advantage per response, by the reward term's name.",
    ),
}
"""(file, line without indentation): the word has its ordinary meaning there."""


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """(line, docstring) of a module, its classes and functions, and of documented constants."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            for item in body:
                value = item.value if isinstance(item, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield item.lineno, value.value


def comments(path: Path) -> Iterator[tuple[int, str]]:
    readline = io.StringIO(path.read_text(encoding="utf-8")).readline
    for token in tokenize.generate_tokens(readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def prose() -> Iterator[tuple[Path, int, str]]:
    """(file, line number, line) of docstrings, comments and pages, without code in backticks."""
    for path in SOURCES:
        for start, text in [*docstrings(path), *comments(path)]:
            for number, line in enumerate(text.splitlines(), start):
                yield path, number, line
    for path in PAGES:
        is_code = False
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.lstrip().startswith("```"):
                is_code = not is_code
            elif not is_code:
                yield path, number, line


def test_summaries_name_the_thing_or_the_action():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.strip().splitlines()[0]}"
        for path in SOURCES
        for line, text in docstrings(path)
        if text.strip() and OPENINGS.match(text.strip())
    ]
    assert not found, "\n".join(found)


def test_words_are_the_field_s():
    found = []
    for path, number, line in prose():
        plain = re.sub(r"`[^`]*`|\[[^\]]*\]\([^)]*\)", "", line)
        name = str(path.relative_to(ROOT))
        for pattern, better in WORDS.items():
            if re.search(pattern, plain, re.I) and (name, line.strip()) not in ALLOWED:
                found.append(f"{name}:{number}: {line.strip()} (better: {better})")
    assert not found, "\n".join(found)
