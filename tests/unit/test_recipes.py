"""The recipes of the papers' tables: every file is a run that can be planned, and a twin of every kind runs."""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from recipes import check

from dynalora.cli.commands import COMMANDS
from dynalora.evaluation.benchmarks import GROUPS, UNION_NAME, find_benchmark
from dynalora.jobs.compare.grid import Comparison
from dynalora.jobs.compare.planning import plan
from dynalora.jobs.compare.run import run_compare
from dynalora.jobs.compare.settings import CompareSpec
from dynalora.jobs.finetune.settings import FinetuneSpec
from dynalora.jobs.gates.settings import GatesSpec
from dynalora.jobs.stages.forgetting import run_forgetting
from dynalora.jobs.stages.recovery import run_recovery
from dynalora.jobs.stages.settings import ForgettingSpec, RecoverSpec, TransferSpec
from dynalora.jobs.stages.transfer import run_transfer
from dynalora.lab.budgets import trainable_parameters
from dynalora.lab.models import empty_model
from dynalora.lab.tasks.mixed import split_source

from . import test_seq2seq, tiny
from .test_experiment_tasks import option_rows, problems

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(RECIPES.glob("*/*.yaml"))
TWINS = [path for path in FILES if path.stem.endswith(".small")]
NAMES = [str(path.relative_to(RECIPES)) for path in FILES]


def kind_of(path: Path) -> type:
    """The settings that a recipe is one of: of which command it is."""
    return COMMANDS[check.command_of(path)].settings


spec_of = check.load


def sources_of(spec: Any) -> list[str]:
    if isinstance(spec, ForgettingSpec):
        return [spec.task_a, spec.task_b]
    return spec.tasks if isinstance(spec, (CompareSpec, TransferSpec)) else []


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_recipe_is_the_settings_of_its_command(path: Path) -> None:
    spec = spec_of(path)
    if isinstance(spec, CompareSpec):
        assert spec.contestants()[0].label == spec.reference
        # Adapters are tried with what they are to be put on, too.
        for own in spec.contestants():
            own.config("SEQ_CLS" if spec.tasks[0] in GROUPS["glue"] else "CAUSAL_LM")
    small = path.stem.endswith(".small")
    assert (getattr(spec, "steps", None) in (20, 30, 60)) == (small and not isinstance(spec, (RecoverSpec, GatesSpec)))
    # Whoever starts a recipe says that code may be executed.
    assert not getattr(spec, "run_code", False)
    assert isinstance(spec, FinetuneSpec) or getattr(spec, "data", None) is None
    if isinstance(spec, GatesSpec):
        assert list(spec.sources()) == ["math", "code", "general"]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_what_a_recipe_trains_on_and_measures_exists(path: Path) -> None:
    for source in sources_of(spec_of(path)):
        if "->" not in source:
            assert find_benchmark(source) is not None
            continue
        _, trained, measured = split_source(source)
        for name in measured:
            assert name in GROUPS or find_benchmark(name) is not None
        for name in trained:
            on_the_hub = re.fullmatch(r"[\w.\-]+/[\w.\-]+", name) is not None
            assert on_the_hub or name in (UNION_NAME, *GROUPS) or find_benchmark(name) is not None


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_the_command_of_a_recipe_is_on_top_of_it(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    head = "\n".join(line for line in lines if line.startswith("#"))
    (command,) = re.findall(r"^#   dynalora (\w+) .*--config (\S+) .*-o \S+", head, re.MULTILINE)
    assert command == (check.command_of(path), f"recipes/{path.relative_to(RECIPES)}")
    runs_code = any(name in source for source in sources_of(spec_of(path)) for name in ("humaneval", "mbpp"))
    assert ("--run-code" in head) == runs_code


def test_the_readme_names_every_recipe_and_twin() -> None:
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    for path in FILES:
        stem = path.stem
        table, _, own = stem.partition(".")
        if path in TWINS:
            assert f"`{stem}`" in text, path
        elif own:
            assert re.search(rf"recipes/{path.parent.name}/{table}\.(?:TASK|MODEL-TASK)\.yaml.*`{own}`", text), path
        else:
            assert f"{table}.yaml" in text, path
    for folder, name in re.findall(r"recipes/([\w-]+)/([\w.\-]+\.yaml)", text):
        assert "TASK" in name or "$" in name or (RECIPES / folder / name).is_file(), name
    # A twin for every table.
    for path in FILES:
        if path not in TWINS:
            table = "glue" if path.stem.startswith("glue") else path.stem.partition(".")[0]
            assert (path.parent / f"{table}.small.yaml").is_file(), path


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("dira/table1", {"r": 32, "learning_rate": 1e-4, "weight_decay": 0.0, "epochs": 3, "validation": 120}),
        ("disel/llama", {"learning_rate": 2e-4, "weight_decay": 0.01, "warmup": 0.02, "max_length": 512, "epochs": 3}),
        ("dislora/table1.sst2", {"learning_rate": 1e-3, "batch_size": 32, "dropout": 0.1, "epochs": 4}),
        ("dislora/table1.qqp", {"learning_rate": 1e-3, "batch_size": 40}),
        ("dislora/table2", {"dropout": 0.05, "epochs": 3, "by_generation": True}),
        ("pe-dyra/table2.stsb", {"learning_rate": 2.2e-3, "batch_size": 32, "epochs": 25, "r": 8}),
        ("pe-dyra/table3.llama3-math", {"learning_rate": 5e-5, "epochs": 5, "r": 4}),
    ],
)
def test_recipes_have_the_papers_numbers(name: str, wanted: Mapping[str, Any]) -> None:
    spec = spec_of(RECIPES / f"{name}.yaml")
    assert {field: getattr(spec, field) for field in wanted} == wanted


def test_recipes_have_the_papers_methods_settings() -> None:
    own = {one.label: one for one in spec_of(RECIPES / "pe-dyra" / "table2.rte.yaml").contestants()}
    assert own["pe-dyra"].options["ortho_weight"] == 0.3
    assert own["pe-dyra-prune"].options["mode"] == "prune"
    own = {one.label: one for one in spec_of(RECIPES / "dislora" / "table2.yaml").contestants()}
    assert [(one.r, one.alpha, one.learning_rates) for label, one in own.items() if label.startswith("dislora-r")] == [
        (8, 16, (5e-4,)), (16, 32, (3e-4,)), (32, 48, (3e-4,)),
    ]  # fmt: skip
    for name in ("dira/table1", "pe-dyra/table3.llama2-math", "dislora/table2"):
        spec = spec_of(RECIPES / f"{name}.yaml")
        assert (
            spec.batch_size * spec.gradient_accumulation
            == {"dira": 32, "pe-dyra": 16, "dislora": 18}[name.partition("/")[0]]
        )


# Training rows, batch size, epochs, and the table's t_f.
FINAL_PHASES = {
    "table2.mnli": (392_702, 32, 7, 65_000), "table2.rte": (2_490, 32, 50, 2_600),
    "table2.qnli": (104_743, 32, 5, 10_000), "table2.mrpc": (3_668, 32, 30, 1_100),
    "table2.qqp": (363_846, 32, 9, 80_000), "table2.sst2": (67_349, 32, 24, 25_000),
    "table2.cola": (8_551, 32, 35, 7_000), "table2.stsb": (5_749, 32, 25, 1_500),
    "table13.cola": (8_551, 32, 35, 7_000), "table14.rte": (2_490, 32, 50, 2_600),
    "table4": (204_045, 24, 25, 180_000), "figure6": (130_319, 16, 25, 190_000),
    "table3.llama2-math": (100_000, 16, 5, 11_250), "table3.llama3-math": (100_000, 16, 5, 11_250),
    "table3.llama2-code": (104_848, 16, 5, 12_765), "table3.llama3-code": (104_848, 16, 5, 12_765),
    "table6": (104_848, 16, 5, 12_765), "table12": (104_848, 16, 5, 12_765),
}  # fmt: skip


@pytest.mark.parametrize("name", FINAL_PHASES)
def test_ranks_rest_in_the_final_phase_of_pe_dyras_tables(name: str) -> None:
    rows, batch, epochs, final = FINAL_PHASES[name]
    spec = spec_of(RECIPES / "pe-dyra" / f"{name}.yaml")
    assert (spec.batch_size * spec.gradient_accumulation, spec.epochs) == (batch, epochs)
    assert spec.train_limit in (None, rows)
    moving = [one for one in spec.contestants() if one.method == "pedyra"]
    assert moving
    assert {one.options["adjust_end"] for one in moving} == {epochs * math.ceil(rows / batch) - final}


def test_recipes_train_as_many_parameters_as_the_papers_print() -> None:
    with torch.device("meta"):
        # DeBERTa-v3-base and Llama2-7B.
        deberta = transformers.DebertaV2ForSequenceClassification(
            transformers.DebertaV2Config(
                vocab_size=128100, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                intermediate_size=3072, type_vocab_size=0, relative_attention=True, position_buckets=256,
                norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"],
                position_biased_input=False,
            )
        )  # fmt: skip
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    own = {one.label: one for one in spec_of(RECIPES / "pe-dyra" / "table2.cola.yaml").contestants()}
    for label in ("lora", "pe-dyra", "pe-dyra-pissa"):  # PE-DyRA, Table 10
        assert round(trainable_parameters(deberta, own[label].config("SEQ_CLS")) / 1e6, 2) == 1.33
    own = {one.label: one for one in spec_of(RECIPES / "dislora" / "table1.cola.yaml").contestants()}
    every = sum(parameter.numel() for parameter in deberta.parameters())
    for label, share in (("lora-r16", 0.48), ("dislora-r16", 0.48), ("lora-r32", 0.95), ("dislora-r64", 1.88)):
        # DisLoRA, Table 1: shares of all parameters, the adapter's included.
        count = trainable_parameters(deberta, own[label].config("SEQ_CLS"))
        assert 100 * count / (every + count) == pytest.approx(share, abs=0.012), label
    own = {one.label: one for one in spec_of(RECIPES / "pe-dyra" / "table3.llama2-math.yaml").contestants()}
    every = sum(parameter.numel() for parameter in llama.parameters())
    for label, share in (("lora", 0.15), ("dora", 0.17), ("adalora", 0.22), ("pe-dyra", 0.15)):  # PE-DyRA, Table 3
        assert round(100 * trainable_parameters(llama, own[label].config("CAUSAL_LM")) / every, 2) == share, label
    with torch.device("meta"):
        bart = transformers.BartForConditionalGeneration(transformers.BartConfig())  # BART-large
    own = {one.label: one for one in spec_of(RECIPES / "pe-dyra" / "table4.yaml").contestants()}
    for label, millions in (("lora", 2.06), ("adalora", 3.09), ("pe-dyra", 2.06)):  # PE-DyRA, Table 4
        count = trainable_parameters(bart, own[label].config("SEQ_2_SEQ_LM"))
        assert round(count / 2**20, 2) == millions, label
    own = {one.label: one for one in spec_of(RECIPES / "dira" / "table1.yaml").contestants()}
    counts = {label: trainable_parameters(llama, own[label].config("CAUSAL_LM")) for label in ("lora", "p-tuning")}
    assert counts["p-tuning"] == pytest.approx(counts["lora"], rel=0.02)


# --- the twins run --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an encoder, and a folder of benchmarks with a few questions of each that twins name."""
    folder = tmp_path_factory.mktemp("recipes")
    tiny.saved_model(folder / "model", width=64)  # 4-bit weights come in blocks of 64
    words = tiny.tokenizer(chat=False)
    words.pad_token = words.eos_token
    words.save_pretrained(folder / "encoder")
    torch.manual_seed(3)
    transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=128,
        )
    ).save_pretrained(folder / "encoder")  # fmt: skip
    both = test_seq2seq.words()
    both.save_pretrained(folder / "both")
    test_seq2seq.made("t5", both, torch.float32).save_pretrained(folder / "both")
    boolq = [
        {"instruction": f"Is {n} odd?\n\nAnswer format: true/false", "output": "true", "answer": "true"}
        for n in range(40)
    ]
    content: dict[str, list[dict[str, Any]]] = {
        "commonsense/boolq.train": boolq[:30], "commonsense/boolq.dev": boolq[30:34],
        "commonsense/ARC-Easy.train": option_rows(0, 30), "commonsense/ARC-Easy.dev": option_rows(40, 3),
        "commonsense/openbookqa.train": option_rows(100, 30), "commonsense/openbookqa.dev": option_rows(140, 3),
        "commonsense/piqa.dev": option_rows(0, 3, "solution"),
        "math/gsm8k.train": problems(0, 60), "math/gsm8k.dev": problems(70, 3),
        "math/SVAMP.dev": [{"instruction": "1 more than 99?", "answer": 100.0}],
        "math/AQuA.dev": [{"instruction": "2+2? (A) 4 (B) 5", "answer": "A"}],
        "code/humaneval.dev": [
            {"prompt": "def f():\n", "entry_point": "f", "test": "def check(f): pass"}
        ],
        "dialogue/convai2.train": [
            {"personality": ["i like tea."], "utterances": [{"candidates": ["a", f"hi {n}"], "history": [f"{n}"]}]}
            for n in range(30)
        ],
    }  # fmt: skip
    content["dialogue/convai2.dev"] = [
        {"personality": ["i like tea."], "utterances": [{"candidates": ["a", "no"], "history": ["yes"]}]}
    ]
    for split, count in (("train", 30), ("test", 3)):
        content[f"summarization/xsum.{split}"] = [
            {"document": f"{split} {n} is long.", "summary": f"{n}"} for n in range(count)
        ]
    for split, count in (("train", 40), ("dev", 6)):
        content[f"qa/squad_v2.{split}"] = [
            {"context": f"{split}: {n} cats.", "question": "What?", "answers": {"text": [f"{n} cats"] * (n % 2)}}
            for n in range(count)
        ]
    for name in ("cola", "sst2"):
        for split, count in (("train", 40), ("dev", 6)):
            content[f"glue/{name}.{split}"] = [{"text": f"{split} {n}.", "label": n % 2} for n in range(count)]
    for name, rows in content.items():
        path = folder / "data" / f"{name}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether this machine can contain code, and has every metric's package, is the affair of other tests."""
    from dynalora.evaluation.kinds import code
    from dynalora.evaluation.metrics import Metric

    monkeypatch.setattr(code, "check_sandbox", lambda **_: None)
    monkeypatch.setattr(Metric, "check", lambda self: None)


def cut(place: Path, path: Path, **more: Any) -> Any:
    """A twin for the tiny models: two steps, three questions, one rate a method, short answers."""
    spec = spec_of(path, data=str(place / "data"), output=str(place / "runs" / path.parent.name / path.stem), **more)
    stand_in = {"MiniLM": "encoder", "t5": "both"}
    model = next((own for name, own in stand_in.items() if name in (spec.model or "")), "model")
    return replace(spec, model=str(place / model))


COMPARED = [path for path in TWINS if kind_of(path) is CompareSpec]


@pytest.mark.parametrize("path", COMPARED, ids=[f"{path.parent.name}-{path.stem}" for path in COMPARED])
@pytest.mark.usefixtures("sandbox")
def test_a_twins_grid_is_planned(place: Path, path: Path) -> None:
    spec = cut(place, path, run_code=True)
    loaded = {source: spec.load_task(source) for source in spec.tasks}
    for task in loaded.values():
        assert len(task.items) >= spec.validation + spec.batch_size
    first = next(iter(loaded.values()))
    model = empty_model(spec.model, heads=first.heads, labels=first.labels)
    planned = plan(spec, loaded, model=model)
    assert [own.label for own in planned] == [own.label for own in spec.contestants()]
    assert all(own.parameters for own in planned)
    by_generation = {"boolq", "arc_easy"} & {own.name for own in getattr(first, "measured", ())}
    assert bool(by_generation) == spec.by_generation


def ran(spec: CompareSpec) -> Comparison:
    comparison = run_compare(spec, apart=False)
    assert comparison.failed == ()
    assert comparison.grid.done() == comparison.grid.total
    assert (Path(spec.output) / "report.html").stat().st_size > 0
    return comparison


short = partial(cut, steps=2, held_out=3, generated=2, generated_tokens=4, eval_batch_size=4)


@pytest.mark.parametrize(
    ("name", "measured"),
    [
        ("dira/table1", {"boolq", "piqa", "arc_easy", "openbookqa"}),
        ("pe-dyra/table3", {"gsm8k", "svamp", "gsm8k flexible"}),
        ("pe-dyra/table14", {"matthews"}),
        ("pe-dyra/figure6", {"f1", "exact", "HasAns_f1", "HasAns_exact", "NoAns_f1", "NoAns_exact"}),
        ("pe-dyra/table4", {"rouge1", "rouge2", "rougeL", "rougeLsum"}),
    ],
    ids=["multiple choice", "word problems", "classification", "marking", "summaries"],
)
def test_a_twin_runs(place: Path, name: str, measured: set[str]) -> None:
    spec = short(place, RECIPES / f"{name}.small.yaml", validation=2)
    comparison = ran(spec)
    results = [
        result
        for cell in comparison.grid.known()
        if (result := comparison.grid.result(cell)) is not None and "training" in result
    ]
    assert len(results) == len(comparison.grid.contestants)
    for result in results:
        assert result["training"]["steps"] == 2
        assert set(result["test"]["metrics"]) == measured
        # A summary and a marked answer are more than right or wrong.
        assert (result["test"]["accuracy"] is None) == (spec.tasks[0] in ("xsum", "squad_v2_spans"))


def test_every_recipe_says_what_is_the_papers_and_what_is_ours() -> None:
    for path in FILES:
        head = path.read_text(encoding="utf-8").split("\nmodel:")[0]
        if path not in TWINS:
            assert re.search(r"^# From the paper", head, re.MULTILINE), path
            assert re.search(r"^# (Not stated|Lost in the text).*\bours\b", head, re.MULTILINE), path


def test_the_transfer_runs(place: Path) -> None:
    found = run_transfer(short(place, RECIPES / "dira" / "figure6.small.yaml", validation=2))
    assert {(one["method"], one["task"]) for one in found if one["task"]} == {
        (method, task) for method in ("lora", "dira") for task in ("arc_easy", "openbookqa")
    }


def test_the_stages_and_the_recovery_run(place: Path) -> None:
    stages = short(place, RECIPES / "dira" / "table4.small.yaml", steps_b=2)
    found = run_forgetting(stages)
    assert [one["stage"] for one in found] == ["base", "initial", "interference", "recovered"]
    assert set(found[1]["scores"]["a"]["metrics"]) == {"arc_easy", "openbookqa"}
    spec = spec_of(
        RECIPES / "dira" / "figure3.small.yaml", source=stages.output, output=str(place / "recovery"), seeds=1
    )
    recovered = run_recovery(spec)
    assert {one["strategy"] for one in recovered} == {"before", "rlgr", "random", "naive"}
