"""Model cards: what a saved or uploaded adapter says of itself, and what happens where dynalora is missing."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import transformers.utils.hub as hub_of_transformers
from huggingface_hub import ModelCard

from dynalora import hub
from tests.matrix.rows import FIRST_OF_EACH_METHOD, Row, every_method
from tests.toys import TOYS

LLAMA = TOYS["llama"]


def section(folder: Path) -> str:
    text = (folder / "README.md").read_text(encoding="utf-8")
    found = re.findall(rf"{hub.BEGIN}(.*?){hub.END}", text, re.DOTALL)
    assert len(found) == 1
    return str(found[0])


@every_method
def test_a_saved_card_names_method_settings_and_import(row: Row, tmp_path: Path) -> None:
    model = row.adapt(LLAMA, rank_pattern={"down_proj": 3}, dropout=0.25)
    model.save_pretrained(tmp_path)
    text = section(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert f"makes {row.config.method.upper()} known to PEFT" in text
    assert "import dynalora" in text
    assert 'AutoPeftModelForCausalLM.from_pretrained("this/repository")' in text
    assert "It adapts 6 matrices, with ranks of 3 to 4, 22 in all." in text
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*)` \|$", text, re.MULTILINE))
    assert rows["r"] == "4"
    assert rows["dropout"] == "0.25"
    assert rows["rank_pattern"] == "{'down_proj': 3}"
    assert rows["target_modules"] == "['down_proj', 'q_proj', 'v_proj']"
    assert "use_rslora" not in rows, "what is the default is not repeated"
    assert ("export_lora" in text) is row.static
    assert hub.PICTURE not in text
    assert not (tmp_path / hub.PICTURE).exists()


def test_saving_again_replaces_the_section_and_redraws_the_picture(tmp_path: Path) -> None:
    row = FIRST_OF_EACH_METHOD[0]
    row.adapt(LLAMA).save_pretrained(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(readme.read_text(encoding="utf-8") + "\nMy own words.\n", encoding="utf-8")
    model = row.adapt(LLAMA, r=2, init_weights=False)
    (tmp_path / hub.PICTURE).write_bytes(b"an old picture")
    model.save_pretrained(tmp_path)
    assert "each with rank 2." in section(tmp_path)
    assert f"]({hub.PICTURE})" in section(tmp_path)
    assert (tmp_path / hub.PICTURE).read_bytes().startswith(b"\x89PNG")
    assert readme.read_text(encoding="utf-8").rstrip().endswith("My own words.")
    assert not list(tmp_path.glob("*.tmp"))


def test_several_adapters_and_no_task_type(tmp_path: Path) -> None:
    row = FIRST_OF_EACH_METHOD[0]
    model = row.adapt(TOYS["mlp"])
    model.add_adapter("second", row.configure(TOYS["mlp"], r=2, target_modules=["first"]))
    model.save_pretrained(tmp_path)
    text = section(tmp_path)
    assert "adapter (adapter `default`)" in text
    assert "It adapts 2 matrices, each with rank 4." in text
    assert "adapter (adapter `second`)" in text
    assert "It adapts 1 matrix, with rank 2." in text
    assert 'PeftModel.from_pretrained(base_model, "this/repository")' in text


class Upload:
    """Takes the Hub's place: keeps what is committed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, card: str) -> None:
        self.files: dict[str, bytes] = {}
        # transformers 5.0 calls functions, later versions one client's methods.
        if hasattr(hub_of_transformers, "hf_api"):
            monkeypatch.setattr(hub_of_transformers, "hf_api", lambda: self)
        else:
            monkeypatch.setattr(hub_of_transformers, "create_repo", self.create_repo)
            monkeypatch.setattr(hub_of_transformers, "create_commit", self.create_commit)
        # As transformers makes it for a new repository.
        monkeypatch.setattr(hub_of_transformers, "create_and_tag_model_card", lambda *args, **kwargs: ModelCard(card))

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, operations: Any, **options: Any) -> str:
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()
        return "done"


@every_method
def test_push_to_hub_uploads_card_and_picture(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = Upload(monkeypatch, "---\nlibrary_name: transformers\n---\n\n# Model Card for Model ID\n\nWords.\n")
    model = row.adapt(LLAMA, init_weights=False)
    assert model.push_to_hub("someone/something") == "done"
    assert set(upload.files) == {"README.md", hub.PICTURE, "adapter_config.json", "adapter_model.safetensors"}
    assert upload.files[hub.PICTURE].startswith(b"\x89PNG")
    (tmp_path / "README.md").write_bytes(upload.files["README.md"])
    assert "import dynalora" in section(tmp_path)
    assert f"]({hub.PICTURE})" in section(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "peft"
    for name, content in upload.files.items():
        (tmp_path / name).write_bytes(content)
    loaded = peft.PeftModel.from_pretrained(LLAMA.build(), tmp_path)
    assert LLAMA.logits(loaded).equal(LLAMA.logits(model))


def test_other_methods_cards_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft.get_peft_model(TOYS["mlp"].build(), peft.LoraConfig(target_modules=["first"]))
    model.save_pretrained(tmp_path)
    assert "dynalora" not in (tmp_path / "README.md").read_text(encoding="utf-8")
    upload = Upload(monkeypatch, "---\n---\nWords.\n")
    model.push_to_hub("someone/something")
    assert hub.PICTURE not in upload.files
    assert b"dynalora" not in upload.files["README.md"]


def test_a_card_that_fails_does_not_cost_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError("no picture today")

    monkeypatch.setattr(hub, "update_card", fail)
    model = FIRST_OF_EACH_METHOD[0].adapt(TOYS["mlp"])
    with pytest.warns(UserWarning, match="no picture today"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_weights_that_are_not_there_are_not_drawn(tmp_path: Path) -> None:
    row = FIRST_OF_EACH_METHOD[0]
    model = peft.get_peft_model(TOYS["mlp"].build(), row.configure(TOYS["mlp"]), low_cpu_mem_usage=True)
    assert hub.draw_rank_map(model, str(tmp_path)) is False
    assert list(tmp_path.iterdir()) == []


def test_without_dynalora_peft_stops_with_the_error_that_the_card_names(tmp_path: Path, run_python: Any) -> None:
    row = FIRST_OF_EACH_METHOD[0]
    row.adapt(TOYS["mlp"]).save_pretrained(tmp_path)
    script = """
        import sys
        import torch
        from peft import PeftModel
        try:
            PeftModel.from_pretrained(torch.nn.Linear(2, 2), sys.argv[1])
        except Exception as error:
            print(f"{type(error).__name__}: {error}")
    """
    printed = run_python(script, str(tmp_path), without_dynalora=True).strip()
    assert printed == f"KeyError: '{row.config.method.upper()}'"
    assert f"`{printed}`" in section(tmp_path)
