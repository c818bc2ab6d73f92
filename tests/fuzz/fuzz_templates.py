"""Hostile chat templates: endless, enormous, broken, or programs that leave the sandbox."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

from fuzz_program import Bench, Case

_CHAT = {
    "messages": [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "ba"},
    ]
}
_LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
_TEMPLATES = {
    "nested loops": _LOOP,
    "loops within a macro": "{% macro f() %}" + _LOOP + "{% endmacro %}{{ f() }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "squares": "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}"
    "{% endfor %}{{ n.x }}",
    "doubled text": "{% set n = namespace(x='a') %}{% for i in range(60) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "repeated text": "{{ 'a' * 10 ** 11 }}",
    "much text": "{% for i in range(9999) %}{{ 'a' * 99999 }}{% endfor %}",
    "padding": "{{ '%99999999999d' % 1 }}",
    "centre": "{{ 'a'|center(99999999999) }}",
    "replace": "{{ ('a' * 99999)|replace('a', 'b' * 99999) }}",
    "list": "{{ range(99999)|list * 99999 }}",
    "self": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "twice self": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(99) }}",
    "recursive loop": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "mro": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch RAN') }}",
    "import": "{% import 'os' as os %}{{ os.system('touch RAN') }}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}",
    "attribute": "{{ messages|attr('__class__') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "raise": "{{ raise_exception('\x1b[2J\u202e' + '\n' * 99) }}",
    "zero": "{{ 1 // 0 }}",
    "index": "{{ messages[99].content.x.y }}",
    "types": "{{ 1 + 'a' }}",
    "undefined call": "{{ nothing() }}",
    "unclosed": "{% if messages %}",
    "unknown tag": "{% nothing %}",
    "deep": "{{" + "(" * 3000 + "1" + ")" * 3000 + "}}",
    "deep blocks": "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "many names": "".join(f"{{% set a{i} = {i} %}}" for i in range(5000)),
    "empty": "",
    "nothing": "{# nothing #}",
    "text alone": "abc",
    "half a character": "{{ '\\ud800' }}",
    "escapes": "\x1b[2J{{ messages[0].content }}",
    "random": "{{ range(99999)|random }}{{ messages[0].content }}",
    "time": "{{ strftime_now('%' * 9999) }}",
    "mutates": "{{ messages.append(1) }}",
    "changes content": "{% for m in messages %}{{ m.update({'content': 1}) }}{% endfor %}",
    "no prefix": "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "generation": "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}",
    "sort": "{{ range(99999)|list|sort(reverse=true)|unique|list|length }}",
    "joined": "{{ ([messages] * 9999)|tojson * 999 }}",
    "lipsum": "{{ lipsum(n=99999) }}",
    "number": "{{ '9' * 9999 | int }}{{ ('9' * 9999)|int }}",
}


def _act(template: str, place: str) -> Callable[[Bench], None]:
    def act(bench: Bench) -> None:
        student = bench.folder / "student"
        shutil.copytree(bench.student, student)
        if place == "file":
            bench.write("student/chat_template.jinja", template.encode("utf-8", "surrogatepass"))
        else:
            config = json.loads((student / "tokenizer_config.json").read_text())
            config["chat_template"] = template
            bench.write("student/tokenizer_config.json", json.dumps(config))
        bench.train([_CHAT, _CHAT], student=student)

    return act


def cases(seed: int) -> list[Case]:
    """Yield all cases; the seed is not used."""
    del seed
    named: dict[str, object] = {
        "number": 7,
        "list": [{"name": "default", "template": "{{ 1 }}"}],
        "object": {"default": "{{ 1 }}"},
    }
    odd = [Case(f"template is a {name}", _act(value, "config")) for name, value in named.items()]  # type: ignore[arg-type]
    return [*(Case(name, _act(text, "file")) for name, text in _TEMPLATES.items()), *odd]
