"""The examples of the README and the guides run as printed, with a tiny model in place of the named one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import peft
import pytest
import torch

import dynalora
from tests.unit import tiny

ROOT = Path(__file__).parents[2]
NAMED_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PAGES = [
    *("README.md", "docs/index.md", "docs/quickstart.md"),
    *("docs/methods/dira.md", "docs/methods/disel.md", "docs/methods/pedyra.md", "docs/forgetting.md"),
]


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_examples_run_as_printed(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = tiny.tokenizer()
    words.pad_token = words.eos_token
    words.save_pretrained(tmp_path / "tiny")
    tiny.model(len(words)).save_pretrained(tmp_path / "tiny")
    tiny.write_jsonl(tmp_path / "train.jsonl", [{"text": f"It is {number}!"} for number in range(16)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    ids = torch.arange(24).reshape(3, 8)
    examples = blocks(page)
    assert examples
    # What the text around the examples takes as given.
    names = {
        "batches": [{"input_ids": ids, "labels": ids}] * 4,
        "tokenizer": words,
        "math_texts": ["1 + 1 = 2", "2 + 3 = 5"],
        "general_texts": ["A passage.", "Another one."],
        "model": peft.get_peft_model(tiny.model(len(words)), dynalora.DiselConfig(target_modules="all-linear")),
    }
    for number, example in enumerate(examples, start=1):
        names["base_model"] = tiny.model(len(words))
        exec(compile(example.replace(NAMED_MODEL, str(tmp_path / "tiny")), f"{page}, example {number}", "exec"), names)
    if page in ("README.md", "docs/quickstart.md"):
        assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
        assert (tmp_path / "my-adapter" / "adapter_config.json").is_file()


def test_the_method_in_the_architecture_page_works(tmp_path: Path) -> None:
    (example,) = blocks("docs/architecture.md")
    (tmp_path / "example.py").write_text(example, encoding="utf-8")
    script = """
        import torch
        from peft import PeftModel, get_peft_model
        from example import ExampleConfig, ExampleLayer
        from tests import toys

        toy = toys.TOYS["mlp"]
        base = toy.logits(toy.build())
        model = get_peft_model(toy.build(), ExampleConfig(r=4, target_modules=list(toy.targets), shrink=0.5))
        assert torch.equal(toy.logits(model), base)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        toy.loss(model).backward()
        optimizer.step()
        for layer in model.modules():
            if isinstance(layer, ExampleLayer):  # e had no gradient while up was zero, so only the method moved it
                assert torch.equal(layer.parameter("e", "default"), torch.full((4,), 0.5))
        trained = toy.logits(model)
        assert not torch.equal(trained, base)
        model.save_pretrained("saved")
        loaded = PeftModel.from_pretrained(toy.build(), "saved")
        assert torch.equal(toy.logits(loaded), trained)
        merged = model.merge_and_unload()
        torch.testing.assert_close(toy.logits(merged), trained)
        try:
            ExampleConfig(shrink=2)
        except ValueError as error:
            assert "shrink must be in [0, 1), got 2" in str(error), error
        else:
            raise AssertionError("shrink=2 was accepted")
    """
    # In a process of its own: registering a method cannot be undone.
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
