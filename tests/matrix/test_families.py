"""A model of each family trains, saves and loads with every method, and generates where it can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import dynalora
from dynalora.errors import ConfigError
from tests.families import FAMILIES
from tests.matrix.rows import Row, every_method
from tests.matrix.test_behaviour import adapted_layers, train
from tests.toys import Toy

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
every_text_family = pytest.mark.parametrize(
    "family", [family for family in FAMILIES.values() if family.task_type], ids=lambda family: family.name
)
every_generator = pytest.mark.parametrize(
    "family",
    [family for family in FAMILIES.values() if family.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM")],
    ids=lambda family: family.name,
)


@every_family
@every_method
def test_trains_saves_and_loads(row: Row, family: Toy, tmp_path: Path) -> None:
    base = family.build()
    expected = family.logits(base)
    model = row.adapt(family, base)
    row.assert_start(family.logits(model), expected)
    train(model, family)
    [report] = dynalora.state_report(model)
    assert report.step == 3, "the method's own part ran at every step"
    trained = family.logits(model)
    assert not torch.allclose(trained, expected, atol=1e-4)

    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(family.build(), tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(family.logits(loaded), trained)
    if row.static:
        torch.testing.assert_close(family.logits(loaded.merge_and_unload()), trained, atol=2e-5, rtol=2e-5)


@every_generator
@every_method
def test_generates(row: Row, family: Toy) -> None:
    """With a cache and with beams, the same text as without a cache."""
    model = row.adapt(family, init_weights=False)
    ids = family.batch(1)["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "min_new_tokens": 4}
    text = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    slow = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
    assert torch.equal(text, slow)
    beams = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=2, **options)
    assert len(beams) == len(ids)


@every_text_family
@every_method
def test_default_targets_are_found(row: Row, family: Toy) -> None:
    kind = family.build().config.model_type
    if kind not in peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        with pytest.raises(ConfigError, match=f"'{kind}', for which there is no default"):
            row.adapt(family, target_modules=None)
        return
    model = row.adapt(family, target_modules=None)
    assert adapted_layers(model)


@every_text_family
@every_method
def test_all_linear_leaves_the_head_out(row: Row, family: Toy) -> None:
    model = row.adapt(family, target_modules="all-linear", modules_to_save=None)
    kinds = {name.rpartition(".")[2] for name in adapted_layers(model)}
    assert len(kinds) > 1
    assert not kinds & {"lm_head", "classifier"}
    family.loss(model.train()).backward()
