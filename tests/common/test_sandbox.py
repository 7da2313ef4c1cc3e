"""Chat templates that would never end, or write more than any text has: each is one line."""

import pytest

from ease_common import sandbox
from ease_common.chat import ChatTemplate
from ease_common.errors import RequestError

MESSAGES = [{"role": "user", "content": "hello"}]
NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TWICE = "{% set ns = namespace(a='ab') %}{% for i in range(99) %}{% set ns.a = JOINED %}{% endfor %}"
MACRO = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (NESTED, "it goes round more than 5000 times"),
        (MACRO, "it goes round more than 5000 times"),
        ("{% for i in range(10**9) %}x{% endfor %}", "it calls something with a number above 16777216"),
        ("{{ lipsum(n=3) }}", "'lipsum' is undefined"),
        ("{% for i in range(4999) %}{{ 'a' * 9999 }}{% endfor %}", "it makes a text or a list longer than"),
        *(
            (TWICE.replace("JOINED", joined), "it makes a text or a list")
            for joined in ("ns.a ~ ns.a", "ns.a + ns.a")
        ),
        (TWICE.replace("JOINED", "[ns.a, ns.a]|join"), "it makes a text or a list"),
        ("{{ 'a' * 10**10 }}", "it makes a text or a list longer than 16777216"),
        ("{{ 10**10 * [1] }}", "it makes a text or a list longer than 16777216"),
        ("{{ 'a'|center(10000000000) }}", "it calls something with a number above 16777216"),
        ("{{ 'a'|center(width=10000000000) }}", "it calls something with a number above 16777216"),
        ("{{ 'a'.ljust(10**10) }}", "it calls something with a number above 16777216"),
        ("{{ (3**4000)**4000 }}", "it computes a number of more than 4096 bits"),
        ("{{ 2**9999999999 }}", "it computes a number of more than 4096 bits"),
        ("{{ '%010000000000d' % 1 }}", "it has a format of 100000 places or more"),
        ("{{ '{:9999999999}'.format(1) }}", "it has a format of 100000 places or more"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
    ],
)
def test_what_does_too_much_is_one_line(monkeypatch: pytest.MonkeyPatch, source: str, reason: str) -> None:
    monkeypatch.setattr(sandbox, "MOST_ROUNDS", 5000)
    template = ChatTemplate(source)
    with pytest.raises(RequestError) as caught:
        template.render(MESSAGES)
    said = str(caught.value)
    assert said.startswith(f"the chat template cannot take these messages: {reason}")
    assert "\n" not in said


def test_time_has_an_end_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MOST_SECONDS", -1.0)
    with pytest.raises(RequestError, match="it takes more than -1 s"):
        ChatTemplate("{% for message in messages %}x{% endfor %}").render(MESSAGES)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (
            "{{ 2**10 }}{{ 'a' * 3 }}{{ '%5d' % 3 }}{{ [1] + [2] }}{{ '{:3}'.format(2) }}",
            "1024aaa    3[1, 2]  2",
        ),
        ("{% set x | upper %}ab{{ 'C'|lower }}{% endset %}{{ x|lower|upper }}", "ABC"),
        ("{% filter upper|trim %} q{{ 'D'|lower }} {% endfilter %}", "QD"),
        ("{% macro m() %}<{{ caller() }}>{% endmacro %}{% call m() %}hi{% endcall %}", "<hi>"),
        ("{% for i in [1, [2]] recursive %}{{ i if i is number else loop(i) }}{% endfor %}", "12"),
        ("{% for i in [] %}x{% else %}none{% endfor %}", "none"),
        (
            "{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ m|tojson(indent=1)|length }}"
            "{% endfor %}",
            "140",
        ),
        ("{{ 'a' ~ 1 ~ none }}{{ '' | default('x', true) }}", "a1Nonex"),
    ],
)
def test_what_templates_do_is_as_it_was(source: str, text: str) -> None:
    assert ChatTemplate(source).render(MESSAGES) == text
    assert ChatTemplate(source).render(MESSAGES) == text


def test_every_rendering_has_a_budget_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MOST_ROUNDS", 60)
    template = ChatTemplate("{% for i in range(50) %}x{% endfor %}")
    assert [template.render(MESSAGES) for _ in range(3)] == ["x" * 50] * 3
