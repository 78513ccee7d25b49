"""What a notebook shows of results."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import peft
import pytest

import dynalora
from dynalora.adapter.state import StateReport, StateReports
from dynalora.forgetting.curves import RetentionCurves, RetentionPoint, RetentionPoints
from dynalora.forgetting.landscape import LandscapeRow
from dynalora.forgetting.retention import Retention
from dynalora.forgetting.trim import TrimCurve, TrimPoint
from tests import toys

EVIL = "<script>x</script>"


class Page(HTMLParser):
    """Tags and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


MEASURED = Retention(kl=0.125, loss_shift=-0.25, base_loss=2.0, tokens=1234, kl_error=0.01)


@pytest.fixture
def model() -> Any:
    return peft.get_peft_model(toys.llama(), dynalora.DiraConfig(r=2, target_modules="all-linear", total_steps=9))


def test_states_and_landscapes_of_a_model(model: Any) -> None:
    reports, rows = dynalora.state_report(model), dynalora.rank_landscape(model)
    assert isinstance(reports, list)
    assert isinstance(rows[0], LandscapeRow)
    state = Page(reports._repr_html_())
    assert state.tags.count("table") == 1
    assert all(word in state.text for word in ("adapter default", "dira", "trained parameters"))
    page = Page(rows._repr_html_())
    assert {"table", "img"} <= set(page.tags)
    assert all(row.kind in page.text for row in rows)


def test_measurements_alone_and_over_a_run() -> None:
    single = Page(MEASURED._repr_html_())
    assert "0.1250 ± 0.0100" in single.text
    assert "1,234" in single.text
    points = [RetentionPoint(EVIL, step, text, MEASURED, 1.0) for step in (1, 2) for text in ("own", EVIL)]
    for shown in (RetentionPoints(points), RetentionCurves({EVIL: points})):
        page = Page(shown._repr_html_())
        assert {"table", "img"} <= set(page.tags)
        assert "script" not in page.tags
        assert page.text.count("step 2") == 2
        assert "step 1" not in page.text  # the last of each text
    assert "Nothing has been measured" in RetentionPoints()._repr_html_()
    curve = Page(TrimCurve([TrimPoint(1.0, 0.5, 0.1, 2.0), TrimPoint(0.5, 0.1, 0.1)])._repr_html_())
    assert {"table", "img"} <= set(curve.tags)


def test_text_is_escaped() -> None:
    report = StateReport(EVIL, EVIL, 1, 2, {EVIL: 3}, 4, {EVIL: {EVIL: 1.0}})
    assert "script" not in Page(StateReports([report])._repr_html_()).tags
