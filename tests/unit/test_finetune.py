from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from rich.console import Console
from safetensors.torch import load_file

from dynalora.errors import ConfigError, DataError, RunFolderError, TrainingError
from dynalora.evaluation.scoring import answer_loss
from dynalora.evaluation.tokens import PLAIN_CHAT_TEMPLATE, TokenizedSet, ensure_pad_token, tokenize
from dynalora.forgetting.curves import read_retention
from dynalora.jobs.finetune import run
from dynalora.jobs.finetune.learning import learned_little, standard_error
from dynalora.jobs.finetune.prepare import prepare
from dynalora.jobs.finetune.run import finetune
from dynalora.jobs.finetune.settings import FinetuneSpec
from dynalora.lab.baselines import BASELINES
from dynalora.lab.configs import adapter_config, check_targets, method_names
from dynalora.lab.data.collator import Collator
from dynalora.lab.data.conversations import to_conversations
from dynalora.lab.models import empty_model, load_model
from dynalora.lab.run_folder import RunFolder, read_metrics
from dynalora.lab.training import train
from dynalora.lab.training.checkpoints import last_checkpoint
from dynalora.lab.training.rates import Rate, rate_for
from dynalora.lab.training.recorder import Recorder
from dynalora.lab.training.settings import TrainSettings
from dynalora.lab.training.train import held_out_loss, take_off, takes_last_logits, train_adapter
from tests.unit import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", tiny.rows(24))


def spec(folder: Path, rows: Path, output: Path, **more: Any) -> FinetuneSpec:
    given = {"steps": 12, "batch_size": 4, "r": 2, "learning_rate": 1e-2, "eval_fraction": 0.25, "retention": False}
    return FinetuneSpec(model=str(folder), data=str(rows), output=str(output), **{**given, **more})


def tokenized(count: int = 8) -> tuple[Any, TokenizedSet]:
    tokenizer = tiny.tokenizer()
    ensure_pad_token(tokenizer)
    chats = to_conversations((f"row {i}", row) for i, row in enumerate(tiny.rows(count)))
    return tokenizer, tokenize(chats, tokenizer)


# --- the learning rate, and whether it was any good ---------------------------------------------------------


def test_a_rate_by_the_methods_name_and_the_runs_length() -> None:
    assert rate_for("lora", 30).rate == rate_for("lora", 100).rate == 1.5e-3
    assert rate_for("lora", 1000).rate == rate_for("lora", 10**6).rate == 2e-4
    between = [rate_for("lora", steps).rate for steps in (100, 101, 200, 400, 999, 1000)]
    assert between == sorted(between, reverse=True)
    assert "between 0.0015, tested for lora in 100 steps, and 0.0002" in rate_for("lora", 300).why
    assert rate_for("lora+", 30) == Rate(2e-4, "the usual one, since none was tested for lora+")
    assert {name for name in method_names() if "none was tested" not in rate_for(name, 30).why} >= {
        "lora", "dira", "disel", "dislora", "pedyra"
    }  # fmt: skip


def test_a_run_without_a_rate_says_which_it_takes_and_records_it(folder: Path, rows: Path, tmp_path: Path) -> None:
    given = {"steps": 3, "learning_rate": None, "method": "dira"}
    screen = io.StringIO()
    asked = spec(folder, rows, tmp_path / "run", **given)
    finetune(asked, console=Console(file=screen, width=200))
    sentence = "Learning rate 0.005, which was tested for dira in runs of 30 to 100 steps"
    assert screen.getvalue().count(sentence) == 1
    assert sentence in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["learning_rate"] == 5e-3
    assert max(r["learning_rate"] for r in read_metrics(tmp_path / "run") if "learning_rate" in r) <= 5e-3
    # A given rate is taken without a word.
    assert prepare(spec(folder, rows, tmp_path / "other", method="dira")).rate == ""
    # Epochs count as the steps that they make: 18 rows, 4 a step, 5 steps an epoch.
    given |= {"steps": None, "epochs": 60.0}
    assert prepare(spec(folder, rows, tmp_path / "other", **given)).spec.learning_rate == rate_for("dira", 300).rate
    # A configuration file has its method's rate.
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"peft_type": "DIRA", "r": 2}), encoding="utf-8")
    given |= {"steps": 3, "epochs": 1.0, "method": str(file)}
    assert prepare(spec(folder, rows, tmp_path / "other", **given)).spec.learning_rate == 5e-3


def test_a_resumed_run_without_a_rate_goes_on_with_its_own(folder: Path, rows: Path, tmp_path: Path) -> None:
    asked = spec(folder, rows, tmp_path / "run", learning_rate=3e-3)
    with RunFolder.create(asked.output, asked.settings()):
        (tmp_path / "run" / "checkpoints").mkdir()
        (tmp_path / "run" / "checkpoints" / "something").touch()
    again = spec(folder, rows, tmp_path / "run", learning_rate=None, resume=True)
    assert prepare(again).spec.learning_rate == 3e-3


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"steps": 30}, None),
        ({"steps": 4, "learning_rate": 1e-9}, r"learned (nothing|little).* take 0.001, which was tested for disel"),
        ({"steps": 4, "learning_rate": 1e-9, "eval_fraction": 0.0}, r"the loss in training .* take 0.001, which"),
        (
            {"steps": 2, "warmup": 0.9, "learning_rate": 2e-3},
            r"Train for more steps \(--steps, --epochs\), or .* 0.002",
        ),
        ({"steps": 2, "warmup": 0.9, "learning_rate": 4e-3}, "learning rate was 0.004; take 0.001, which was tested"),
    ],
)
def test_a_run_that_learned_next_to_nothing_says_what_to_change(
    folder: Path, rows: Path, tmp_path: Path, given: dict[str, Any], expected: str | None
) -> None:
    screen = io.StringIO()
    finetune(spec(folder, rows, tmp_path / "run", method="disel", **given), console=Console(file=screen, width=2000))
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for text in (screen.getvalue(), html):
        assert (re.search(expected, text) is not None) if expected else ("The run has learned" not in text)
    # Of what has hardly been learned there is nothing to leave out.
    assert expected is None or "of its update the adapter forgets" not in screen.getvalue()


def test_training_data_that_were_learned_by_heart(folder: Path, rows: Path, tmp_path: Path) -> None:
    """It is no longer training that they want."""
    asked = spec(folder, rows, tmp_path / "run", method="lora", eval_data=None)
    ready = prepare(asked)
    losses = [{"step": step, "loss": loss} for step, loss in enumerate((4.0, 2.0, 0.6, 0.2), start=1)]
    held_out = [{"step": 0, "held_out_loss": 4.0}, {"step": 2, "held_out_loss": 3.5}]
    result = SimpleNamespace(held_out_before=4.0, held_out_after=4.1, steps=4, records=[*losses, *held_out])
    said = learned_little(ready, result)  # type: ignore[arg-type]
    assert "the held-out loss did not fall (4.0000 before, 4.1000 after). The loss in training fell from 4.00" in said
    assert "to 0.20, so the training data were learned by heart" in said
    assert "the lowest held-out loss, which was 3.5000 at step 2 (--keep-best)." in said
    assert "more steps" not in said


def test_the_error_of_a_fall_is_that_of_its_conversations(folder: Path, rows: Path, tmp_path: Path) -> None:
    """Against the spread over halves of the conversations drawn again and again."""
    asked = spec(folder, rows, tmp_path / "run", steps=6, eval_fraction=0.5)
    ready = prepare(asked)
    result = finetune(asked)
    error = standard_error(ready, result)
    losses = {}
    for which in ("base", "tuned"):
        with result.model.disable_adapter() if which == "base" else contextlib.nullcontext():
            losses[which] = answer_loss(result.model, ready.held_out.rows)
    generator = torch.Generator().manual_seed(0)
    falls = []
    for _ in range(2000):
        drawn = torch.randint(len(ready.held_out), (len(ready.held_out),), generator=generator).tolist()
        tokens = sum(losses["base"].counts[i] for i in drawn)
        falls.append(sum(losses["base"].sums[i] - losses["tuned"].sums[i] for i in drawn) / tokens)
    assert error == pytest.approx(float(torch.tensor(falls).std()), rel=0.25)


# --- configurations ---------------------------------------------------------------------------------------


def test_every_method_has_a_configuration() -> None:
    for name in method_names():
        config = adapter_config(name, r=4, target_modules="q_proj,v_proj")
        assert name in BASELINES or str(config.peft_type).upper().endswith(name.upper())
        assert getattr(config, "target_modules", {"q_proj", "v_proj"}) == {"q_proj", "v_proj"}
        assert getattr(config, BASELINES[name].rank if name in BASELINES else "r") == 4
    assert adapter_config("lora", r=4).lora_alpha == 8
    assert adapter_config("LoRA", r=4, alpha=4).lora_alpha == 4
    assert adapter_config("disel", r=4).alpha == 8


def test_options_reach_the_configuration_as_numbers() -> None:
    assert adapter_config("dira", options={"penalty_weight": "1e-3"}).penalty_weight == 1e-3
    assert adapter_config("disel", options={"gate_bias_init": -1}).gate_bias_init == -1
    assert adapter_config("lora", options={"use_rslora": True}).use_rslora


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "qlora"}, "Unknown method 'qlora'; did you mean 'lora'"),
        ({"method": "disel", "r": 0}, "The rank r is 0; give a whole number of at least 1"),
        ({"method": "dira", "options": {"penalty_wieght": 1}}, "no option 'penalty_wieght'; did you mean"),
        ({"method": "lora", "options": {"penalty_weight": 1}}, "Method 'lora' has no option 'penalty_weight'"),
        ({"method": "disel", "options": {"r": 4}}, "'r' is a setting of its own"),
        ({"method": "disel", "dropout": 2.0}, "dropout must be in"),
        ({"method": "dira", "options": {"penalty": "l1"}}, "penalty must be one of"),
        ({"method": "lora", "options": {"layers_pattern": "h"}}, "The settings of method 'lora' do not fit together"),
    ],
)  # fmt: skip
def test_wrong_configuration_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapter_config(**given)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"epochs": 0.0}, "epochs is 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"warmup": 1.0}, "warmup is 1.0"),
        ({"schedule": "step"}, "schedule is 'step'; choose one of cosine, linear"),
        ({"save_every": -1}, "save_every is -1"),
        ({"eval_fraction": 1.0}, "eval_fraction is 1.0"),
        ({"dtype": "int8"}, "dtype is 'int8'; choose one of auto"),
        ({"quantization": "2bit"}, "quantization is '2bit'; choose one of 4bit, 8bit, int8"),
        ({"max_length": 1}, "max_length is 1"),
        ({"limit": 0}, "limit is 0"),
        ({"monitor_every": -1}, "monitor_every is -1"),
        ({"max_forgetting": 0.0}, "max_forgetting is 0.0"),
        ({"max_forgetting": 0.1, "retention": False}, "max_forgetting needs measurements"),
        ({"max_forgetting": 0.1, "monitor_every": 0}, "max_forgetting needs measurements"),
        ({"keep_best": True, "eval_fraction": 0.0}, "keep_best goes by the held-out loss"),
        ({"keep_best": True, "eval_every": 0}, "keep_best goes by the held-out loss"),
        ({"monitor_text": ["wiki.txt"]}, "monitor_text is 'wiki.txt'; write it as NAME=SOURCE"),
    ],
)
def test_wrong_settings_are_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FinetuneSpec(model="m", data="d", output="o", **changed)


def test_targets_are_found_without_weights(folder: Path) -> None:
    model = empty_model(str(folder))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert len(check_targets(model, adapter_config("lora", target_modules=["q_proj", "v_proj"]))) == 4
    assert len(check_targets(model, adapter_config("disel", target_modules=r".*layers\.0\..*_proj"))) == 7
    everything = check_targets(model, adapter_config("dira"))
    adapted = peft.get_peft_model(tiny.model(64), adapter_config("dira"))
    assert len(everything) == len(adapted.targeted_module_names) == 14


@pytest.mark.parametrize("method", ["lora", "dira"])
@pytest.mark.parametrize(
    ("kind", "task"),
    [("SequenceClassification", "SEQ_CLS"), ("TokenClassification", "TOKEN_CLS"), ("QuestionAnswering", None)],
)
def test_all_linear_is_read_as_peft_reads_it(kind: str, task: str | None, method: str) -> None:
    settings = transformers.BertConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, num_labels=3
    )
    model = getattr(transformers, f"BertFor{kind}")(settings)
    config = adapter_config(method, task_type=task or "QUESTION_ANS")
    checked = check_targets(model, config)
    adapted = peft.get_peft_model(model, config)
    assert checked == adapted.targeted_module_names
    assert checked
    assert not any(name.startswith(("classifier", "qa_outputs")) for name in checked)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "query"], "target_modules 'query' matches nothing; the model's linear modules are q_proj, k_proj"),
        (r".*\.nowhere", r"target_modules '.\*\\.nowhere' matches nothing; the model's linear modules are"),
        ("(q_proj", r"target_modules '\(q_proj' is not a valid regular expression"),
    ],
)
def test_targets_that_match_nothing(targets: Any, message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        check_targets(empty_model(str(folder)), adapter_config("lora", target_modules=targets))


# --- measuring and training -------------------------------------------------------------------------------


def test_held_out_loss_counts_every_token_once() -> None:
    tokenizer, rows = tokenized()
    rows.rows[0]["input_ids"], rows.rows[0]["labels"] = (rows.rows[0]["input_ids"][:-2], rows.rows[0]["labels"][:-2])
    model = tiny.model(len(tokenizer)).train()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows.rows:
            logits = model.eval()(torch.tensor([row["input_ids"]])).logits[0, :-1].double()
            labels = torch.tensor(row["labels"][1:])
            total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
            count += int((labels != -100).sum())
    model.train()
    for batch_size in (1, 3, 8):
        assert held_out_loss(model, rows, batch_size=batch_size) == pytest.approx(total / count, rel=1e-5)
    assert model.training


FAMILIES: dict[str, Any] = {
    "llama": lambda vocabulary: tiny.model(vocabulary),
    "gpt2": lambda vocabulary: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=256)
    ),
    "gemma2": lambda vocabulary: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, sliding_window=16, pad_token_id=None, bos_token_id=None,
        )
    ),
    "opt": lambda vocabulary: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=vocabulary, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            word_embed_proj_dim=32, max_position_embeddings=256,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "disel"])
def test_logits_of_the_last_positions_alone_give_the_same_loss_and_gradients(family: str, method: str) -> None:
    tokenizer, rows = tokenized()
    model = FAMILIES[family](len(tokenizer)).double().eval()
    start = "init_lora_weights" if method == "lora" else "init_weights"
    config = adapter_config(method, r=2, dropout=0.0, options={start: False})
    adapted = peft.get_peft_model(model, config).double()
    assert takes_last_logits(adapted) == (family != "gpt2")  # whose class has no loss by name
    found = []
    for last_logits in (False, True):
        batch = Collator(tokenizer.pad_token_id, last_logits=last_logits)(rows.rows[:5])
        adapted.zero_grad()
        output = adapted(**batch)
        output.loss.backward()
        grown = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}
        found.append((output.loss, grown, output.logits.shape[1]))
    (loss, gradients, width), (other, same, kept) = found
    assert kept < width  # or nothing would be saved
    torch.testing.assert_close(other, loss)
    assert gradients.keys() == same.keys()
    assert len(gradients) > 4
    torch.testing.assert_close(same, gradients)


def test_training_asks_for_the_logits_of_the_last_positions_alone() -> None:
    tokenizer, rows = tokenized()
    model = tiny.model(len(tokenizer))
    shapes: list[tuple[int, int]] = []

    def note(module: Any, inputs: Any, kept: dict[str, Any], output: Any) -> None:
        if module.training:
            shapes.append((kept["input_ids"].shape[1], output.logits.shape[1]))

    model.register_forward_hook(note, with_kwargs=True)
    train_adapter(model, tokenizer, adapter_config("dira", r=2), rows, settings=TrainSettings(steps=3, batch_size=4))
    assert len(shapes) == 3
    assert all(kept < length for length, kept in shapes)


def test_a_batch_without_labels_keeps_one_position() -> None:
    batch = Collator(0, last_logits=True)([{"input_ids": [5, 6, 7], "labels": [-100] * 3}])
    assert batch["logits_to_keep"].tolist() == [2]
    assert batch["shift_labels"].tolist() == [[-100]]


@pytest.mark.parametrize("method", method_names())
def test_training_learns_and_gives_the_base_model_back(method: str) -> None:
    tokenizer, rows = tokenized()
    model = tiny.model(len(tokenizer))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # AdaLoRA and IncreLoRA start from three factors that are all small or zero, and take longer; LoRA+ has a rate 16
    # times as high.
    rate = {"adalora": 1e-1, "lora+": 5e-3, "p-tuning": 1e-2, "increlora": 1e-1}.get(method, 2e-2)
    settings = TrainSettings(steps=10, batch_size=4, learning_rate=rate, log_every=1, eval_every=5)
    result = train_adapter(model, tokenizer, adapter_config(method, r=2), rows, rows, settings=settings)
    assert result.steps == 10
    assert result.held_out_before is not None
    assert result.held_out_after is not None
    assert result.held_out_after < 0.9 * result.held_out_before
    assert result.step_seconds is not None
    assert result.step_seconds_quartiles is not None
    assert 0 < result.step_seconds_quartiles[0] <= result.step_seconds <= result.step_seconds_quartiles[1]
    assert [record["step"] for record in result.records if "loss" in record] == list(range(1, 11))
    assert [record["step"] for record in result.records if "held_out_loss" in record] == [0, 5, 10]
    assert not result.model.training
    restored = take_off(result.model).state_dict()
    edited = method in BASELINES and BASELINES[method].edits_base
    assert edited != all(torch.equal(restored[name], tensor) for name, tensor in before.items())


def test_same_seed_gives_the_same_adapter() -> None:
    tokenizer, rows = tokenized()

    def weights(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(seed + 5)  # what happened before must not matter
        settings = TrainSettings(steps=3, batch_size=4, seed=seed, gradient_checkpointing=seed == 2)
        trained = train_adapter(
            tiny.model(len(tokenizer)), tokenizer, adapter_config("disel", r=2), rows, settings=settings
        )
        return peft.get_peft_model_state_dict(trained.model)

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_gradient_checkpointing_changes_nothing_but_memory() -> None:
    tokenizer, rows = tokenized()
    kept = []
    for checkpointing in (False, True):
        settings = TrainSettings(steps=3, batch_size=4, gradient_checkpointing=checkpointing)
        trained = train_adapter(
            tiny.model(len(tokenizer)), tokenizer, adapter_config("disel", r=2), rows, settings=settings
        )
        assert not trained.model.is_gradient_checkpointing
        kept.append(peft.get_peft_model_state_dict(trained.model))
    for name in kept[0]:
        torch.testing.assert_close(kept[0][name], kept[1][name])


def test_bf16_computes_in_bfloat16_and_keeps_the_weights() -> None:
    tokenizer, rows = tokenized()
    seen: dict[bool, set[torch.dtype]] = {}
    losses = {}
    for bf16 in (False, True):
        model = tiny.model(len(tokenizer))
        dtypes = seen.setdefault(bf16, set())
        hook = model.model.layers[0].mlp.register_forward_hook(
            lambda module, args, output, dtypes=dtypes: dtypes.add(output.dtype)
        )
        settings = TrainSettings(steps=3, batch_size=4, bf16=bf16, log_every=1)
        trained = train_adapter(model, tokenizer, adapter_config("dira", r=2), rows, settings=settings)
        assert {parameter.dtype for parameter in trained.model.parameters()} == {torch.float32}
        while_training = dtypes.copy()
        dtypes.clear()
        trained.model(**tokenizer("one", return_tensors="pt"))
        assert dtypes == {torch.float32}, "the model comes back as it was"
        hook.remove()
        dtypes |= while_training
        losses[bf16] = [record["loss"] for record in trained.records if "loss" in record]
    assert seen == {False: {torch.float32}, True: {torch.bfloat16, torch.float32}}
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=0.02)


def test_bf16_with_weights_in_float16_is_refused() -> None:
    tokenizer, rows = tokenized()
    with pytest.raises(ConfigError, match=r"bf16 is set, and the weights are in float16"):
        train_adapter(
            tiny.model(len(tokenizer)).half(),
            tokenizer,
            adapter_config("lora"),
            rows,
            settings=TrainSettings(bf16=True),
        )


def test_empty_training_set_is_refused() -> None:
    tokenizer, _ = tokenized()
    with pytest.raises(DataError, match="The training set is empty"):
        train_adapter(tiny.model(len(tokenizer)), tokenizer, adapter_config("lora"), TokenizedSet())


# --- the whole job ----------------------------------------------------------------------------------------


def test_whole_job(folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNALORA_CACHE", str(tmp_path / "cache"))
    screen = io.StringIO()
    run = tmp_path / "run"
    result = finetune(spec(folder, rows, run, retention=True), console=Console(file=screen, width=200))
    made = sorted(entry.name for entry in run.iterdir() if entry.name != "run.lock")
    assert made == [
        "adapter", "config.yaml", "metrics.jsonl", "plots", "report.html", "retention.jsonl", "run.json"
    ]  # fmt: skip
    assert sorted(entry.name for entry in (run / "plots").iterdir()) == [
        "gates.png", "loss.png", "retention.png", "retention.svg", "scaled.png", "scaled.svg"
    ]  # fmt: skip
    assert json.loads((run / "run.json").read_text())["finished"]
    records = list(read_metrics(run))
    assert {record["run"] for record in records} == {"disel"}
    assert next(record for record in records if "retention" in record)["retention"]["kl"] > 0
    # The adapter, loaded as any PEFT adapter is, gives the same outputs.
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(base, run / "adapter").eval()
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, result.model(tokens).logits)
    assert transformers.AutoTokenizer.from_pretrained(run / "adapter").chat_template == tiny.CHAT_TEMPLATE
    # Terminal and report tell the same numbers.
    html = (run / "report.html").read_text(encoding="utf-8")
    for text in (f"{result.held_out_before:.4f}", f"{result.held_out_after:.4f}", f"{result.trainable_parameters:,}"):
        assert text in html
        assert text in screen.getvalue()
    assert "\x1b" not in screen.getvalue()
    images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', html)
    assert [base64.b64decode(image)[:5] for image in images] == [b"<?xml"] * len(images)
    assert images
    assert (run / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    # Its settings make the same job again.
    again = yaml.safe_load((run / "config.yaml").read_text())
    assert FinetuneSpec(**again).settings() == again
    with pytest.raises(RunFolderError, match=r"already holds a run \(method disel.*finished\)"):
        finetune(FinetuneSpec(**again))
    with pytest.raises(RunFolderError, match="has finished; there is nothing to resume"):
        finetune(FinetuneSpec(**again, resume=True))


def test_forgetting_is_followed_and_kept_within_its_budget(
    folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNALORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "plain.txt").write_text("One paragraph\nof two lines.\n\nAnother one.\n")
    given = {"retention": True, "monitor_every": 3, "monitor_text": [f"plain={tmp_path / 'plain.txt'}"]}

    def job(name: str, **more: Any) -> tuple[Any, dict[int, float], str]:
        screen = io.StringIO()
        asked = spec(folder, rows, tmp_path / name, method="lora", **given, **more)
        result = finetune(asked, console=Console(file=screen, width=200))
        (points,) = read_retention(tmp_path / name / "retention.jsonl").values()
        assert {point.text for point in points} == {"own text", "plain"}
        worst: dict[int, float] = {}
        for point in points:
            worst[point.step] = max(worst.get(point.step, 0.0), point.retention.kl)
        return result, worst, " ".join(screen.getvalue().split())

    whole, curve, _ = job("whole")
    assert list(curve) == [0, 3, 6, 9, 12]
    budget = (curve[3] + curve[6]) / 2
    stopped, seen, told = job("stopped", max_forgetting=budget)
    assert stopped.steps == 6
    assert seen[6] == pytest.approx(curve[6])
    assert "At step 6 KL on" in told
    assert "the run was stopped" in told
    assert "the run was stopped" in (tmp_path / "stopped" / "report.html").read_text(encoding="utf-8")
    kept, _, told = job("kept", max_forgetting=budget, keep_best=True)
    assert kept.steps == 12
    assert "the weights are those of step 3" in told
    assert kept.held_out_after != whole.held_out_after
    saved = load_file(tmp_path / "kept" / "adapter" / "adapter_model.safetensors")
    state = peft.get_peft_model_state_dict(kept.model)
    assert all(torch.equal(saved[name], state[name]) for name in saved)
    record = next(record for record in read_metrics(tmp_path / "kept") if "retention" in record)
    assert record["retention"]["kl"] <= budget


def test_prompts_are_learned_where_that_is_asked_for(
    folder: Path, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answers = prepare(spec(folder, rows, tmp_path / "a"))
    both = prepare(spec(folder, rows, tmp_path / "b", loss_on_prompts=True))
    assert [row["input_ids"] for row in both.training.rows] == [row["input_ids"] for row in answers.training.rows]
    assert all(row["labels"] == row["input_ids"] for row in both.training.rows)
    assert both.training.response_tokens > answers.training.response_tokens
    assert both.held_out.rows == answers.held_out.rows  # measured is what it was
    assert not caplog.records
    turn = {"role": "assistant", "content": "no", "weight": 0}
    chats = [{"messages": [{"role": "user", "content": f"{n}"}, turn] * 2} for n in range(4)]
    for chat in chats:
        chat["messages"][-1] = {**turn, "weight": 1}
    unlearned = tiny.write_jsonl(tmp_path / "unlearned.jsonl", chats)
    prepare(spec(folder, unlearned, tmp_path / "c", loss_on_prompts=True, eval_fraction=0))
    assert "loss_on_prompts learns all tokens, those of 4 messages of weight 0 included" in caplog.text
    first = [
        next(
            r["loss"]
            for r in finetune(spec(folder, rows, tmp_path / f"{given}", steps=1, **{"loss_on_prompts": given})).records
            if "loss" in r
        )
        for given in (False, True)
    ]
    assert first[0] != first[1]


@pytest.mark.parametrize("method", ["lora", "pedyra", "adalora"])
def test_the_weights_of_the_lowest_held_out_loss_are_kept(
    method: str, folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"method": method, "eval_every": 2}
    plain = finetune(spec(folder, rows, tmp_path / "plain", **given))
    losses = {record["step"]: record["held_out_loss"] for record in plain.records if "held_out_loss" in record}
    assert list(losses) == [0, 2, 4, 6, 8, 10, 12]
    # As if the loss were lowest at step 6.
    monkeypatch.setattr(train, "held_out_loss", lambda *args, **more: abs(held_out_loss(*args, **more) - losses[6]))
    kept = finetune(spec(folder, rows, tmp_path / "kept", keep_best=True, **given))
    assert (kept.steps, kept.best_step) == (12, 6)
    assert kept.held_out_after == pytest.approx(0, abs=1e-5)
    assert "those of step 6, the best" in (tmp_path / "kept" / "report.html").read_text(encoding="utf-8")
    assert [r["loss"] for r in kept.records if "loss" in r] == [r["loss"] for r in plain.records if "loss" in r]
    again = peft.PeftModel.from_pretrained(load_model(str(folder), dtype="float32"), str(tmp_path / "kept" / "adapter"))
    ready = prepare(spec(folder, rows, tmp_path / "again", **given))
    assert held_out_loss(again, ready.held_out) == pytest.approx(losses[6], rel=1e-4)


def test_what_a_method_weighed_and_decided_is_kept(folder: Path, rows: Path, tmp_path: Path) -> None:
    finetune(spec(folder, rows, tmp_path / "run", method="dislora", log_every=1, method_options={"tsd_count": 2}))
    logged = [record for record in read_metrics(tmp_path / "run") if "loss" in record]
    assert len(logged) == 12
    for record in logged:
        assert record["dislora_task_weight"] + record["dislora_ortho_weight"] == pytest.approx(1)
        assert record["dislora_task_loss"] == pytest.approx(record["loss"], rel=1e-3)
    decided = json.loads((tmp_path / "run" / "decisions.json").read_text())
    modules = {row["module"] for row in decided}
    assert len(decided) == 2 * len(modules) > 0
    assert all(row["change_rate"] >= 0 for row in decided)
    assert (tmp_path / "run" / "plots" / "method.png").read_bytes().startswith(b"\x89PNG")
    assert "weighed and measured" in (tmp_path / "run" / "report.html").read_text()


def test_the_ranks_that_moved_are_kept(folder: Path, rows: Path, tmp_path: Path) -> None:
    options = {"adjust_start": 2, "adjust_interval": 2, "adjust_end": 8, "adjust_size": 1}
    finetune(spec(folder, rows, tmp_path / "run", method="pedyra", log_every=1, method_options=options))
    decided = json.loads((tmp_path / "run" / "decisions.json").read_text())
    assert sum(row["rank"] for row in decided) == 2 * len(decided)
    assert len({row["rank"] for row in decided}) > 1
    assert (tmp_path / "run" / "plots" / "method.png").exists()


def test_held_out_data_from_elsewhere(folder: Path, rows: Path, tmp_path: Path) -> None:
    other = tiny.write_jsonl(tmp_path / "held.jsonl", [*tiny.rows(2), {"prompt": "New?", "response": "Yes."}])
    ready = prepare(spec(folder, rows, tmp_path / "run", eval_data=str(other)))
    assert (len(ready.training), len(ready.held_out)) == (24, 1)
    assert ready.modules > 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["disel", "dira"])
def test_killed_run_continues_exactly(
    method: str, folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"method": method, "save_every": 4, "log_every": 1, "eval_every": 3, "dropout": 0.1}
    finetune(spec(folder, rows, tmp_path / "whole", **more))
    on_step_end = Recorder.on_step_end

    def killed(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        on_step_end(self, args, state, control, **rest)
        if state.global_step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_step_end", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune(spec(folder, rows, tmp_path / "run", **more))
    assert last_checkpoint(tmp_path / "run" / "checkpoints").name == "checkpoint-4"
    # The kill hit while the next checkpoint was being written.
    (tmp_path / "run" / "checkpoints" / "checkpoint-6").mkdir()
    with pytest.raises(RunFolderError, match=r"learning_rate was 0\.01, now 0\.02"):
        finetune(spec(folder, rows, tmp_path / "run", **more, learning_rate=0.02, resume=True))
    result = finetune(spec(folder, rows, tmp_path / "run", **more, resume=True))
    assert result.steps == 12

    whole, resumed = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "run"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    def told(name: str, key: str) -> list[tuple[int, float]]:
        return [(record["step"], record[key]) for record in read_metrics(tmp_path / name) if key in record]

    for key in ("loss", "held_out_loss", "learning_rate"):
        assert told("whole", key) == told("run", key)
    assert [step for step, _ in told("run", "loss")] == list(range(1, 13))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a copy of this process that can be killed")
@pytest.mark.parametrize(
    ("killed_at", "left"),
    [
        ("the start", None),
        ("a step between checkpoints", "checkpoint-4"),
        ("the middle of writing the adapter", "checkpoint-4"),
        ("the middle of writing the optimizer's state", "checkpoint-4"),
    ],
)
def test_moving_ranks_continue_exactly_wherever_the_run_is_killed(
    killed_at: str, left: str | None, folder: Path, rows: Path, tmp_path: Path
) -> None:
    """Ranks move at steps 2, 4, … 10, checkpoints are written after steps 4, 8 and 12; a real SIGKILL in between."""
    options = {"adjust_start": 2, "adjust_interval": 2, "adjust_end": 10, "adjust_size": 1}
    more = {"method": "pedyra", "method_options": options, "save_every": 4, "log_every": 1, "dropout": 0.1}
    finetune(spec(folder, rows, tmp_path / "whole", **more))

    child = os.fork()
    if child == 0:
        try:
            _die_at(killed_at)
            finetune(spec(folder, rows, tmp_path / "run", **more))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    found = last_checkpoint(tmp_path / "run" / "checkpoints")
    assert (found.name if found else None) == left
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-8").exists() == ("writing" in killed_at)
    result = finetune(spec(folder, rows, tmp_path / "run", **more, resume=True))
    assert result.steps == 12

    whole, resumed = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "run"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    ranks = [json.loads((tmp_path / name / "decisions.json").read_text(encoding="utf-8")) for name in ("whole", "run")]
    assert ranks[0] == ranks[1]
    assert len({row["rank"] for row in ranks[0]}) > 1


def _die_at(point: str) -> None:
    """Have this process killed, without any clean-up, at a point of its run."""
    on_step_end, save, save_adapter = (Recorder.on_step_end, torch.save, peft.PeftModel.save_pretrained)
    step = 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        nonlocal step
        on_step_end(self, args, state, control, **rest)
        step = state.global_step
        if (point, step) in (("the start", 1), ("a step between checkpoints", 7)):
            die()

    def cut(path: Path) -> None:
        written = path.read_bytes()
        path.write_bytes(written[: len(written) // 2])
        die()

    def half_an_optimizer(what: Any, path: Any, *args: Any, **more: Any) -> None:
        save(what, path, *args, **more)
        if point == "the middle of writing the optimizer's state" and step == 8:
            cut(Path(path))

    def half_an_adapter(self: Any, path: Any, *args: Any, **more: Any) -> None:
        save_adapter(self, path, *args, **more)
        if point == "the middle of writing the adapter" and step == 8:
            cut(Path(path) / "adapter_model.safetensors")

    Recorder.on_step_end = counted  # type: ignore[method-assign]
    torch.save = half_an_optimizer
    peft.PeftModel.save_pretrained = half_an_adapter


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dira", "dislora"])
def test_two_processes_train_as_one(method: str, folder: Path, rows: Path, tmp_path: Path) -> None:
    # 16 training rows: whole batches only, so that both see the same ones.
    finetune(spec(folder, rows, tmp_path / "one", batch_size=4, method=method, log_every=1, eval_fraction=1 / 3))
    arguments = [
        "finetune", "-m", str(folder), "-d", str(rows), "-o", str(tmp_path / "two"), "--method", method, "-b", "2",
        "--steps", "12", "-r", "2", "--lr", "1e-2", "--eval-fraction", str(1 / 3), "--no-retention",
        "--log-every", "1",
    ]  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launcher = subprocess.Popen(
        [*launch, "-m", "dynalora.cli.main", *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(run.__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        told, _ = launcher.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(launcher.pid, signal.SIGKILL)  # the workers too
        raise
    assert launcher.returncode == 0, told[-3000:]
    for key in ("loss", "held_out_loss"):
        one, two = (
            [record[key] for record in read_metrics(tmp_path / name) if key in record] for name in ("one", "two")
        )
        assert len(one) > 1
        assert two == pytest.approx(one, rel=1e-4)


def test_nothing_is_loaded_or_made_before_everything_is_checked(
    folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    broken = tiny.write_jsonl(tmp_path / "broken.jsonl", [{"txt": "a"}])
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("")
    for changed, error, message in (
        ({"method": "qlora"}, ConfigError, "Unknown method 'qlora'"),
        ({"target_modules": ["query"]}, ConfigError, "target_modules 'query' matches nothing"),
        ({"model": str(tmp_path / "nowhere")}, ConfigError, "cannot be used"),
        ({"data": str(broken)}, DataError, "its fields are 'txt'"),
        ({"output": str(tmp_path / "used")}, RunFolderError, "found thesis.tex"),
    ):
        given = {"model": str(folder), "data": str(rows), "output": str(tmp_path / "run"), **changed}
        with pytest.raises(error, match=message):
            finetune(FinetuneSpec(**given))
        assert not (tmp_path / "run").exists()


def test_base_model_without_chat_template_is_tuned_and_remembered(rows: Path, tmp_path: Path) -> None:
    model = tiny.saved_model(tmp_path / "base", chat=False)
    finetune(spec(model, rows, tmp_path / "run", steps=2))
    kept = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter").chat_template
    assert kept == PLAIN_CHAT_TEMPLATE


def test_a_loss_that_is_no_number_stops_the_run_and_says_why() -> None:
    tokenizer, rows = tokenized()
    settings = TrainSettings(steps=20, batch_size=4, learning_rate=1e30, warmup=0.0, max_grad_norm=0.0)
    model = tiny.model(len(tokenizer))
    with pytest.raises(TrainingError, match=r"The loss of disel is nan at step \d+: .* lower learning_rate \(1e\+30\)"):
        train_adapter(model, tokenizer, adapter_config("disel", r=2), rows, settings=settings)
