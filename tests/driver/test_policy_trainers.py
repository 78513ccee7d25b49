"""Trainers that compare a policy with its reference: who the reference is, and that what samples is what scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dynalora
from dynalora.adapter.layer import adapter_layers
from dynalora.errors import UnsupportedError
from tests.driver.loops import CONFIGS, adapted, loop, trainer_options
from tests.driver.test_trainers import tokenizer
from tests.toys import TOYS, llama, tokens

TOY = TOYS["llama"]
PROMPTS = ["w3w7w9", "w4w8", "w5w6w7", "w9w9"]


def words() -> Any:
    """The tests' tokenizer, which reads words that stand without spaces."""
    import tokenizers

    made = tokenizer()
    made.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"w\d+"), "isolated")
    return made


def rewards(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(set(str(completion)))) for completion in completions]


def grpo(model: Any, folder: Path, **options: Any) -> Any:
    """GRPO on four prompts, which notes what it scores, with which adapters."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets")

    class Noting(trl.GRPOTrainer):
        noted: list[tuple[bool, list[str], Any, torch.Tensor]] = []  # noqa: RUF012 - one class for each run

        def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
            layer = next(iter(adapter_layers(self.accelerator.unwrap_model(model)).values()))
            off = layer.disable_adapters
            self.noted.append((off, list(layer.active_adapters), (args, kwargs), result[0].detach().clone()))
            return result

    usual = {**trainer_options(folder), "max_steps": 2, "learning_rate": 0.1}
    settings = trl.GRPOConfig(
        **{**usual, "num_generations": 2, "max_completion_length": 4, "beta": 0.1, "bf16": False, **options},
        gradient_checkpointing=False,
    )
    rows = datasets.Dataset.from_dict({"prompt": PROMPTS})
    given = {"peft_config": model} if not isinstance(model, torch.nn.Module) else {}
    trainer = Noting(
        llama() if given else model, args=settings, reward_funcs=rewards, train_dataset=rows, processing_class=words(),
        **given,
    )  # fmt: skip
    trainer.train()
    return trainer


def scored_by(model: Any, call: Any) -> torch.Tensor:
    """What another model says to what was scored: log-probabilities of the last tokens, (texts, tokens)."""
    (ids, mask, count, *_), _ = call
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, attention_mask=mask).logits[:, -count - 1 : -1]
    result: torch.Tensor = logits.log_softmax(-1).gather(-1, ids[:, -count:, None]).squeeze(-1)
    return result


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("dira", "pedyra")]


@pytest.mark.parametrize("name", ["disel", "dislora", *SLOW])
def test_the_reference_of_grpo_is_the_base_model(name: str, tmp_path: Path) -> None:
    trainer = grpo(CONFIGS[name](), tmp_path)
    references = [(call, values) for off, _, call, values in trainer.noted if off]
    assert len(references) == 2
    for call, values in references:
        torch.testing.assert_close(values, scored_by(llama(), call), atol=1e-5, rtol=1e-5)
    assert [report.step for report in dynalora.state_report(trainer.model)] == [2]


@pytest.mark.parametrize("name", ["disel", "pedyra"])
def test_the_reference_of_grpo_is_the_adapter_that_was_trained_before(name: str, tmp_path: Path) -> None:
    model = adapted(CONFIGS[name](total_steps=8))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loop(model, optimizer, [tokens(2, 6)] * 4)
    model.save_pretrained(tmp_path / "before")
    import peft

    trainer = grpo(model, tmp_path / "run")
    before = peft.PeftModel.from_pretrained(llama(), tmp_path / "before")
    references = [(call, values) for _, active, call, values in trainer.noted if active == ["ref"]]
    assert len(references) == 2
    for call, values in references:
        torch.testing.assert_close(values, scored_by(before, call), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["dira", "disel", "dislora", "pedyra"])
def test_what_samples_is_what_scores(name: str) -> None:
    """Token by token with a cache, and all at once in training: the same gates, and so the same probabilities."""
    model = adapted(CONFIGS[name](total_steps=8), dtype=torch.float64)
    loop(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), [tokens(2, 6)] * 3)
    prompt = tokens(3, 5)
    said = model.generate(
        input_ids=prompt, max_new_tokens=6, do_sample=True, return_dict_in_generate=True, output_logits=True,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    scored = model.train()(input_ids=said.sequences).logits[:, prompt.shape[1] - 1 : -1]
    # transformers hands out what it sampled from in float32.
    torch.testing.assert_close(torch.stack(said.logits, dim=1), scored.detach().float(), atol=1e-6, rtol=1e-6)


def test_gates_that_are_held_for_a_run_let_a_server_have_merged_weights() -> None:
    """As TRL gives vLLM its weights: merged, read out, and unmerged between training steps."""
    model = adapted(CONFIGS["disel"]())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with pytest.raises(UnsupportedError, match="snapshot"):
        model.merge_adapter()
    record = dynalora.record_gates(model, [{"input_ids": tokens(2, 6)}])
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    with dynalora.export.held_gates(model, record):
        for seed in range(2):
            loop(model, optimizer, [tokens(2, 6, seed=seed)])
            expected = TOY.logits(model)
            model.merge_adapter()
            torch.testing.assert_close(TOY.logits(model), expected, atol=1e-5, rtol=1e-5)
            model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, before[name]) == ("gate" in name), name
