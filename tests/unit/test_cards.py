"""Cards without what nobody filled in, and with everything that somebody wrote."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
from huggingface_hub import ModelCard

from dynalora.common.cards import tidy_card, without_blanks
from dynalora.lab.choices import own_methods
from dynalora.lab.configs import adapter_config
from tests.unit import tiny


def saved(method: str, folder: Path) -> Path:
    model = tiny.model(259)
    model.config._name_or_path = model.name_or_path = "org/base"
    peft.get_peft_model(model, adapter_config(method, r=2, target_modules=["q_proj"])).save_pretrained(folder)
    return folder / "README.md"


@pytest.mark.parametrize("method", own_methods())
def test_cards_of_own_methods_say_only_what_is_known(method: str, tmp_path: Path) -> None:
    text = saved(method, tmp_path).read_text()
    assert "More Information" not in text
    assert "Model ID" not in text
    assert "[optional]" not in text
    headings = [line for line in text.splitlines() if line.startswith("#") and "makes" not in line]
    assert headings[0] == "# Adapter of org/base"
    assert len(headings) == 4  # and the method, how to load it, and the versions
    assert ModelCard(text).data.base_model == "org/base"
    assert "PEFT" in text.rpartition("### Framework versions")[2]


def test_what_somebody_wrote_stays(tmp_path: Path) -> None:
    file = saved("lora", tmp_path)
    text = file.read_text()
    assert "[More Information Needed]" in text
    text = text.replace("## Uses\n", "## Uses\n\nFor tests.\n\n```bash\n# no heading\nmake test\n```\n", 1).replace(
        "### Results\n\n[More Information Needed]", "### Results\n\nGood ones. [More Information Needed] no."
    )
    text = text.replace("- **License:** [More Information Needed]", "- **License:** MIT")
    text += "\n## Mine\n\n## Mine, empty\n\n<!-- a comment of mine -->\n"
    file.write_text(text)
    tidy_card(tmp_path)
    tidied = file.read_text()
    for own in ("## Uses\n\nFor tests.", "# no heading\nmake test", "- **License:** MIT", "## Mine\n\n## Mine, empty"):
        assert own in tidied
    assert "<!-- a comment of mine -->" in tidied
    assert "### Model Description" in tidied  # holds the licence
    assert "Model Sources" not in tidied
    assert "Environmental" not in tidied
    assert "[More Information Needed]" not in tidied
    assert without_blanks(tidied) == tidied


def test_a_card_that_is_no_template_is_left_alone(tmp_path: Path) -> None:
    text = "---\nlicense: mit\n---\n\n\n\n# Mine\n\n## Uses\n\n## Evaluation\n"
    assert without_blanks(text) == text
    tidy_card(tmp_path)
    assert list(tmp_path.iterdir()) == []
