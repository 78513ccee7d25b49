"""Encoder-decoders are trained and measured: checked against one text at a time, one token at a time, in float64."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tokenizers import processors

import dynalora
from dynalora.common.names import IGNORED_LABEL
from dynalora.errors import ConfigError
from dynalora.evaluation.generation import chat_prompt, generate
from dynalora.evaluation.heads import LANGUAGE_MODELS
from dynalora.evaluation.run import measure, prepare
from dynalora.evaluation.scoring import answer_loss
from dynalora.evaluation.seq2seq import Seq2SeqCollator, shortened
from dynalora.evaluation.tokens import tokenize
from dynalora.jobs.compare.run import run_compare
from dynalora.jobs.compare.settings import CompareSpec
from dynalora.jobs.evaluate.run import evaluate
from dynalora.jobs.evaluate.settings import EvaluateSpec
from dynalora.lab.models import empty_model, load_model, load_tokenizer
from dynalora.lab.training.settings import TrainSettings
from dynalora.lab.training.train import train_adapter

from . import tiny

ARTICLES = [f"The cat number {n} sat on a mat{' again' * (n % 7)}." for n in range(24)]
SUMMARIES = [f"Cat {n}{' sat' * (n % 3)}." for n in range(24)]


def words() -> Any:
    """A tokenizer that puts its own tokens around every text, as BART's and T5's do."""
    made = tiny.tokenizer(chat=False)
    made.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", made.bos_token_id), ("</s>", made.eos_token_id)]
    )
    made.model_max_length = 96
    return made


def made(kind: str, tokenizer: Any, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(5)
    special = {
        "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }  # fmt: skip
    if kind == "bart":
        config: Any = transformers.BartConfig(
            d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=48, decoder_ffn_dim=48, dropout=0.0, max_position_embeddings=96, init_std=0.3,
            decoder_start_token_id=tokenizer.eos_token_id, forced_bos_token_id=None, **special,
        )  # fmt: skip
        model: Any = transformers.BartForConditionalGeneration(config)
    else:
        config = transformers.T5Config(
            d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, n_positions=96, initializer_factor=3.0,
            dropout_rate=0.0, decoder_start_token_id=tokenizer.pad_token_id, **special,
        )  # fmt: skip
        model = transformers.T5ForConditionalGeneration(config)
    model.generation_config.forced_bos_token_id = None
    model.generation_config.forced_eos_token_id = None
    return model.to(dtype).eval()


def conversations(count: int) -> list[Any]:
    return [
        [{"role": "user", "content": ARTICLES[n]}, {"role": "assistant", "content": SUMMARIES[n]}] for n in range(count)
    ]


def next_token(model: Any, question: list[int], said: list[int]) -> torch.Tensor:
    """Log-probabilities of the token after `said`, one text alone, nothing padded and nothing cached."""
    begun = torch.tensor([[model.config.decoder_start_token_id, *said]])
    with torch.no_grad():
        output = model(input_ids=torch.tensor([question]), decoder_input_ids=begun, use_cache=False)
    return output.logits[0, -1].log_softmax(-1)


KINDS = ["bart", "t5"]


def test_question_and_answer_carry_the_tokenizers_own_tokens_and_the_answer_the_loss() -> None:
    tokenizer = words()
    (row,) = tokenize(conversations(1), tokenizer).rows
    question, answer = tokenizer(ARTICLES[0])["input_ids"], tokenizer(SUMMARIES[0])["input_ids"]
    assert row["input_ids"] == question + answer
    assert row["labels"] == [IGNORED_LABEL] * len(question) + answer
    assert tokenizer.decode(answer) == f"<s>{SUMMARIES[0]}</s>"
    # What is learned from is what is asked, system message included.
    system: Any = [{"role": "system", "content": "Be short."}, *conversations(1)[0]]
    (row,) = tokenize([system], tokenizer).rows
    assert row["input_ids"][: row["labels"].count(IGNORED_LABEL)] == chat_prompt(tokenizer, ARTICLES[0], "Be short.")


def test_long_questions_lose_their_end_and_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = words()
    long: Any = [{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "An x."}]
    with caplog.at_level(logging.WARNING):
        rows = tokenize([long, *conversations(3)], tokenizer).rows
    assert "1 of 4 questions are longer than the 96 tokens" in caplog.text
    assert rows[0]["labels"].count(IGNORED_LABEL) == 96
    assert rows[0]["input_ids"][:96] == tokenizer("x" * 94)["input_ids"]
    assert rows[0]["input_ids"][96:] == tokenizer("An x.")["input_ids"]
    assert shortened([1, 2, 3], None) == [1, 2, 3] == shortened([1, 2, 3], 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapted", [False, True])
def test_the_loss_of_answers_is_that_of_one_token_after_the_other(kind: str, adapted: bool) -> None:
    tokenizer = words()
    model = made(kind, tokenizer)
    if adapted:
        model = peft.get_peft_model(
            model, dynalora.DiselConfig(r=4, target_modules="all-linear", task_type="SEQ_2_SEQ_LM", total_steps=5)
        )
        model.to(torch.float64).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "dynalora" in name:
                    parameter.normal_(0, 0.2)
    rows = tokenize(conversations(7), tokenizer).rows
    found = answer_loss(model, rows, batch_size=3)
    for index, row in enumerate(rows):
        start = row["labels"].count(IGNORED_LABEL)
        question, answer = row["input_ids"][:start], row["labels"][start:]
        said = [next_token(model, question, answer[:place]) for place in range(len(answer))]
        by_hand = -sum(float(one[token]) for one, token in zip(said, answer, strict=True))
        assert found.sums[index] == pytest.approx(by_hand, rel=1e-6)  # scores are summed in float32
        assert found.counts[index] == len(answer)
        assert found.greedy[index] == all(int(one.argmax()) == token for one, token in zip(said, answer, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_likeliest_tokens_whatever_the_batch(kind: str) -> None:
    tokenizer = words()
    model = made(kind, tokenizer)
    wanted = []
    for article in ARTICLES[:7]:
        said: list[int] = []
        while len(said) < 6 and (not said or said[-1] != tokenizer.eos_token_id):
            said.append(int(next_token(model, tokenizer(article)["input_ids"], said).argmax()))
        wanted.append(tokenizer.decode(said, skip_special_tokens=True).strip())
    assert len(set(wanted)) > 1  # they depend on the question
    for batch_size in (1, 3, 7):
        assert generate(model, tokenizer, ARTICLES[:7], max_new_tokens=6, batch_size=batch_size) == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_trained_on_the_loss_that_is_measured(kind: str) -> None:
    tokenizer = words()
    rows = tokenize(conversations(6), tokenizer)
    model = made(kind, tokenizer, torch.float32)
    before = answer_loss(model, rows.rows)
    batch = Seq2SeqCollator(tokenizer.pad_token_id)(rows.rows)
    assert batch["labels"].shape[1] == max(before.counts)
    loss = model(**batch).loss  # the model's own, padding left out by its labels
    assert loss.item() == pytest.approx(before.mean, rel=1e-5)
    config = dynalora.DiraConfig(r=4, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
    settings = TrainSettings(steps=12, batch_size=6, learning_rate=2e-2, warmup=0.0, schedule="constant_with_warmup",
                             log_every=1, eval_every=0, save_every=0)  # fmt: skip
    trained = train_adapter(model, tokenizer, config, rows, settings=settings)
    losses = [record["loss"] for record in trained.records if "loss" in record]
    assert losses[0] == pytest.approx(before.mean, rel=1e-3)  # the first step's, at the base model
    assert answer_loss(trained.model, rows.rows).mean < 0.9 * before.mean


# --- commands ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seq2seq")
    tokenizer = words()
    tokenizer.model_max_length = 10**30  # as of many models; BART knows 96 positions all the same
    tokenizer.save_pretrained(folder / "bart")
    made("bart", tokenizer, torch.float32).save_pretrained(folder / "bart")
    (folder / "data" / "summarization").mkdir(parents=True)
    for split, start, stop in (("train", 0, 18), ("test", 18, 24)):
        rows = [
            {"document": ARTICLES[n] + "!" * 300 * (n % 5 == 0), "summary": SUMMARIES[n]} for n in range(start, stop)
        ]
        tiny.write_jsonl(folder / "data" / "summarization" / f"xsum.{split}.jsonl", rows)
    return folder


def spec(place: Path, **more: Any) -> CompareSpec:
    settings: dict[str, Any] = {
        "model": str(place / "bart"), "data": str(place / "data"), "tasks": ["xsum"], "output": str(place / "out"),
        "methods": ["lora", "adalora", "dira", "disel", "dislora", "pedyra"], "learning_rates": [5e-3], "seeds": 1,
        "r": 4, "steps": 6, "batch_size": 4, "max_length": 512, "held_out": 6, "generated": 4, "generated_tokens": 5,
        "validation": 3, "target_modules": "all-linear",
    }  # fmt: skip
    return CompareSpec(**{**settings, **more})


def test_compare_trains_and_measures_them(place: Path) -> None:
    comparison = run_compare(spec(place), apart=False)
    assert comparison.failed == ()
    grid = comparison.grid
    results = {cell.method: result for cell in grid.known() if (result := grid.result(cell)) is not None}
    assert set(results) == {"base", "lora", "adalora", "dira", "disel", "dislora", "pedyra"}
    for method, result in results.items():
        assert {"rouge1", "rouge2", "rougeL"} <= set(result["test"]["metrics"])
        assert result["retention"] is None
        if method != "base":
            assert result["training"]["steps"] == 6
            assert result["test"]["loss"] != results["base"]["test"]["loss"]
    parameters = {own.label: own.parameters for own in grid.contestants}
    assert parameters["pedyra"] == pytest.approx(parameters["lora"], rel=0.02)
    assert "rouge" in (place / "out" / "results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"template": "alpaca"}, "no prompt template; leave out `template` 'alpaca'"),
        ({"methods": ["lora", "p-tuning"]}, "p-tuning learns virtual tokens"),
        ({"tasks": ["arc_easy"]}, "arc_easy needs a causal language model"),
        ({"retention_tasks": ["wikitext2"]}, "retention_tasks names wikitext2"),
    ],
)
def test_compare_refuses_what_they_cannot_do(place: Path, more: dict[str, Any], said: str) -> None:
    write_text(place)
    if more.get("tasks"):
        from .test_experiment_tasks import option_rows

        (place / "data" / "commonsense").mkdir(exist_ok=True)
        for split in ("train", "dev"):
            tiny.write_jsonl(
                place / "data" / "commonsense" / f"ARC-Easy.{split}.jsonl", option_rows(0 if split == "dev" else 40, 20)
            )
    with pytest.raises(ConfigError, match=said):
        run_compare(spec(place, output=str(place / "refused"), **more), apart=False)


def test_what_needs_a_causal_language_model_says_so(place: Path) -> None:
    name = str(place / "bart")
    for load in (empty_model, load_model):
        with pytest.raises(ConfigError, match=r"is an encoder-decoder \(bart\), and a causal language model is needed"):
            load(name)
        assert type(load(name, heads=LANGUAGE_MODELS)) is transformers.BartForConditionalGeneration
    tokenizer = load_tokenizer(name, template=None)
    with pytest.raises(ConfigError, match="needs a causal language model"):
        measure(load_model(name, heads=LANGUAGE_MODELS), tokenizer, prepare("wikitext2", data=write_text(place)))


def write_text(place: Path) -> Path:
    (place / "data" / "text").mkdir(exist_ok=True)
    (place / "data" / "text" / "wikitext2.test.txt").write_text("A text.\n" * 50)
    return place / "data"


def test_evaluate_measures_a_model_and_a_saved_adapter(place: Path, tmp_path: Path) -> None:
    base = load_model(str(place / "bart"), dtype="float32", heads=LANGUAGE_MODELS)
    adapted = peft.get_peft_model(base, dynalora.DiraConfig(r=2, target_modules="all-linear", task_type="SEQ_2_SEQ_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    told: dict[str, Any] = {"task": ["xsum"], "data": str(place / "data"), "max_new_tokens": 5, "dtype": "float32"}
    (plain,) = evaluate(EvaluateSpec(source=str(place / "bart"), **told))
    (with_adapter,) = evaluate(EvaluateSpec(source=str(tmp_path / "adapter"), model=str(place / "bart"), **told))
    assert with_adapter.answers == plain.answers  # it begins as the base model
    assert plain.items == 6
    prompts = [item.prompt for item in prepare("xsum", data=place / "data").items]
    assert (
        plain.too_long == sum(len(prompt) + 2 > 96 for prompt in prompts) > 0
    )  # a byte is a token; their beginning is read
    assert all(plain.answers)
    with pytest.raises(ConfigError, match="no prompt template"):
        evaluate(EvaluateSpec(source=str(place / "bart"), template="alpaca", **told))
