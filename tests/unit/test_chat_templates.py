"""Chat templates of strangers: those that never end are refused, and those of models are not."""

from __future__ import annotations

from typing import Any

import pytest

from dynalora.errors import DataError
from dynalora.evaluation import chat_templates
from dynalora.evaluation.chat_templates import check_chat_template
from dynalora.evaluation.prompts import TEMPLATES
from dynalora.evaluation.tokens import PLAIN_CHAT_TEMPLATE
from dynalora.lab.models import load_tokenizer
from tests.unit import tiny

COUNTING = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x"
SOUND = {
    "plain": PLAIN_CHAT_TEMPLATE,
    "loops": "{% for m in messages %}{% for w in m.content.split() %}{{ w * 2 }}{% endfor %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ '-' * 3 ~ m.content }}{% endgeneration %}{% endfor %}",
    "that refuses": "{{ raise_exception('no ' * 3) }}",
    "that is none": "{% for m in range(3) %}",
    **{name: template.chat_template for name, template in TEMPLATES.items()},
}


def having(template: Any) -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (COUNTING, "takes too long"),
        ("{{ 'a' * 10**6 }}", "endless text"),
        ("{{ 'a' * 10**11 }}", "endless text"),
        ("{% if not add_generation_prompt %}{{ 'a' * 10**6 }}{% endif %}", "endless text"),
        ("{{ '%1000000d' % 1 }}", "endless text"),
        ({"default": "{{ messages[0].content }}", "tools": COUNTING}, "takes too long"),
    ],
    ids=["counting", "large", "larger than memory", "answers", "padding", "one of several"],
)
def test_templates_without_an_end_are_refused(template: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_templates, "_SECONDS", 1)
    chat_templates._tried.cache_clear()
    with pytest.raises(DataError, match=f"chat template .*{message}"):
        check_chat_template(having(template))


@pytest.mark.parametrize("name", sorted(SOUND))
def test_other_templates_are_taken(name: str) -> None:
    check_chat_template(having(SOUND[name]))


def test_a_models_own_template_is_tried_when_it_is_loaded(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_templates, "_SECONDS", 1)
    having(COUNTING).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="takes too long"):
        load_tokenizer(str(tmp_path))
    assert load_tokenizer(str(tmp_path), template="alpaca").chat_template == TEMPLATES["alpaca"].chat_template
