"""The sandbox of chat templates: what transformers' gives, and what a hostile template can't do."""

from __future__ import annotations

import datetime
import time

import pytest

from llmfast.chat import sandbox
from llmfast.chat.sandbox import LARGEST, LONGEST_TEMPLATE, PART, Sandbox, TemplateLimit, size_of


def rendered(source: str, longest: int = 1 << 20, **variables) -> str:
    environment = Sandbox()
    return environment.rendered(environment.compiled(source), variables, longest)


@pytest.mark.parametrize(
    "source, text",
    [
        ("{% for x in [1, 2, 3] %}{{ x }}{% if not loop.last %},{% endif %}{% endfor %}", "1,2,3"),
        ("{% for x in xs %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{{ loop.length }}{% endfor %}", "1333"),
        ("{% for x in xs %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}", "1"),
        ("{% for a, b in pairs.items() %}{{ a ~ '=' ~ b }} {% endfor %}", "x=1 y=2 "),
        ("{% generation %}a{{ xs[0] }}{% endgeneration %}b", "a1b"),
        (
            "{{ pairs | tojson }} {{ 'é<' | tojson }} {{ xs | tojson(indent=1) }}",
            '{"x": 1, "y": 2} "é<" [\n 1,\n 2,\n 3\n]',
        ),
        ("  {% if true %}\n  a\n  {% endif %}\n", "  a\n"),
        ("{% set ns = namespace(n=0) %}{% for x in range(5) %}{% set ns.n = ns.n + x %}{% endfor %}{{ ns.n }}", "10"),
        ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(1) + m('a') }}", "<1><a>"),
        ("{{ 'a b'.split(' ') | join('-') ~ 'x' * 3 }} {{ '%s%%' % 5 }} {{ 2 ** 3 }}", "a-bxxx 5% 8"),
        ("{{ xs | selectattr('real', 'gt', 1) | map('string') | list }}", "['2', '3']"),
        ("{{ ' a ' | trim }}{{ 'ab'[::-1] }}{{ (1, 2)[1] }}{{ xs[1:] }}{{ missing is defined }}", "aba2[2, 3]False"),
        ("{{ '<|x|>' + s }}", "<|x|><&>"),
    ],
)
def test_what_templates_use(source, text):
    assert rendered(source, xs=[1, 2, 3], pairs={"x": 1, "y": 2}, s="<&>") == text


def test_the_date():
    assert rendered("{{ strftime_now('%Y') }}") == str(datetime.date.today().year)


SIXTY = "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = GROWN %}{% endfor %}{{ n.x }}"
HOSTILE = {
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a loop of nothing": "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "a long text": "{{ 'a' * 10 ** 9 }}",
    "a text doubled": SIXTY.replace("GROWN", "n.x ~ n.x"),
    "added": SIXTY.replace("GROWN", "n.x + n.x"),
    "a list doubled": SIXTY.replace("GROWN", "[n.x, n.x]"),
    "a dictionary doubled": SIXTY.replace("GROWN", "{'a': n.x, 'b': n.x}"),
    "a namespace doubled": SIXTY.replace("GROWN", "namespace(a=n.x, b=n.x)"),
    "padding": "{{ 'a'.ljust(999999999) }}",
    "zeros": "{{ '1'.zfill(999999999) }}",
    "a wide number": "{{ '%999999999d' % 1 }}",
    "a wide number from beside": "{{ '%*d' % (999999999, 1) }}",
    "format": "{{ '{:>999999999}'.format(1) }}",
    "a great power": "{{ 9 ** 9 ** 9 }}{{ 9 ** (9 ** 9) }}",
    "replacing": "{% set x = 'a' * 1000000 %}{{ x.replace('', x) }}",
    "replacing by a filter": "{% set x = 'a' * 1000000 %}{{ x | replace('a', x) }}",
    "joining": "{% set x = 'a' * 1000000 %}{{ ([x] * 30) | join(x) }}",
    "indenting": "{{ ('\\n' * 1000000) | indent(1000000) }}",
    "indented json": "{{ [[[1]]] | tojson(indent=99999999) }}",
    "batches": "{{ [1] | batch(999999999, 0) | list }}",
    "a wide date": "{{ strftime_now('%0999999999d') }}",
    "output": "{% for i in range(99999) %}" + "x" * 99 + "{% endfor %}",
    "calls of itself": "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "a way out": "{{ ''.__class__.__mro__ }}",
    "a way out by a filter": "{{ '' | attr('__class__') }}",
    "functions of functions": "{{ range.__init__.__globals__ }}",
    "what it should not change": "{{ messages.append(1) }}",
    "a file": "{% include '/etc/passwd' %}",
    "nesting": "{{ " + "(" * 3000 + ")" * 3000 + " }}",
    "signs": "{{ " + "-" * 100000 + "1 }}",
    "conditions": "{% if a %}" * 500,
    "an unknown filter": "{{ 'a' | pprint }}",
    "no template": "{{",
    "its own error": "{{ raise_exception('roles must\n alternate') }}",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_one_clear_line(name, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 1.0)
    monkeypatch.setattr(sandbox, "STEPS", 100_000)
    start = time.monotonic()
    with pytest.raises(ValueError) as caught:
        rendered(HOSTILE[name], messages=[])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert time.monotonic() - start < 20


def test_a_template_that_takes_its_time(monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.05)
    with pytest.raises(TemplateLimit, match=r"steps or 0\.05 seconds"):
        rendered("{% for i in range(99999) %}{% for j in range(9) %}{% endfor %}{% endfor %}")


def test_what_its_error_says():
    with pytest.raises(ValueError, match=r"^the model's chat template fails: roles must alternate$"):
        rendered(HOSTILE["its own error"])


def test_long_output_and_templates():
    assert len(rendered("{{ 'a' * 1000 }}", longest=1000)) == 1000
    with pytest.raises(TemplateLimit, match="writes more than 999 characters"):
        rendered("{{ 'a' * 1000 }}", longest=999)
    with pytest.raises(TemplateLimit, match="1,048,577 characters"):
        rendered("x" * (LONGEST_TEMPLATE + 1))


def test_one_render_does_not_use_up_the_next(monkeypatch):
    monkeypatch.setattr(sandbox, "STEPS", 50)
    environment = Sandbox()
    template = environment.compiled("{% for i in range(30) %}{{ i }}{% endfor %}")
    with pytest.raises(TemplateLimit):  # a step for every round, and one for what it writes
        environment.rendered(template, {}, 1000)
    monkeypatch.setattr(sandbox, "STEPS", 100)
    first = environment.rendered(template, {}, 1000)
    assert [environment.rendered(template, {}, 1000) for _ in range(3)] == [first] * 3


def test_sizes():
    assert size_of("abc") == PART + 3 and size_of(10**30) == PART
    assert size_of([["ab"], {"a": (1, 2)}]) == 8 * PART + 3
    cycle: list = []
    cycle.append(cycle)
    assert size_of(cycle) > LARGEST
