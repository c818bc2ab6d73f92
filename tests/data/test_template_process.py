"""Chat templates in a process with limits.

Frozen here: what is rendered is what the tokenizer renders; loops, large texts and refusals are one
DataError each, after which the next chat is rendered; the process ends with its owner.
"""

from __future__ import annotations

import gc
import os
import time

import pytest
import tiny

from okd_lightning.data import template_process
from okd_lightning.data.template_process import TemplateProcess
from okd_lightning.errors import DataError

CHAT = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
GOOD = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{{ add_generation_prompt }}"
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
BAD = {
    LOOP: "takes more than 1 seconds",
    "{{ 9 ** (9 ** 9) }}": "takes more than 1 seconds|needs more than",
    "{{ 'a' * 10 ** 11 }}": "needs more than 1 GiB",
    "{{ 'a' * 10 ** 7 }}": "makes 10,000,0.. characters of a chat of",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "calls itself without end",
    "{{ raise_exception('\x1bno') }}": r"refuses this chat \(\\x1bno\)",
    "{{ ''.__class__.__mro__ }}": "refuses this chat .*unsafe",
    "{% if %}": "refuses this chat",
    "{{ 1 // 0 }}": "refuses this chat",
}


@pytest.fixture
def make_process(monkeypatch):
    monkeypatch.setattr(template_process, "_SECONDS", 1)

    def make(template: str) -> TemplateProcess:
        tokenizer = tiny.make_tokenizer()
        tokenizer.chat_template = template
        return TemplateProcess(tokenizer)

    return make


def test_it_renders_what_the_tokenizer_does(make_process):
    process = make_process(GOOD)
    wanted = [(CHAT, {"add_generation_prompt": False}), (CHAT[:1], {"add_generation_prompt": True})]
    assert process.render(wanted, "t") == ["user:ab;assistant:c;False", "user:ab;True"]


@pytest.mark.parametrize("template", BAD)
def test_limits(template, make_process):
    process = make_process(template + GOOD.replace("{%", "{% if 0 %}{% endif %}{%", 1))
    for _ in range(2):
        with pytest.raises(DataError, match=f"row 3: the template ({BAD[template]})"):
            process.render([(CHAT, {})], "row 3: the template")


def test_it_ends_with_its_owner(make_process):
    process = make_process(GOOD)
    process.render([(CHAT, {})], "t")
    child = process._child
    os.kill(child, 0)
    del process
    gc.collect()
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    pytest.fail("it still runs")
