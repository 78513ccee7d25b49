from __future__ import annotations

import csv
import dataclasses
import importlib
import inspect
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file

import dynalora
from dynalora import __version__
from dynalora.cli import main
from dynalora.cli.commands import COMMANDS as TABLE
from dynalora.cli.program import app
from dynalora.jobs.demo import run as demo
from dynalora.jobs.finetune import run as finetune
from dynalora.lab.configs import adapter_config, method_names
from dynalora.lab.settings import describe
from dynalora.methods import METHODS
from tests.unit import tiny
from tests.unit.program import Program

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "demo",
    "finetune",
    "chat",
    "generate",
    "evaluate",
    "compare",
    "bench",
    "landscape",
    "gates",
    "forgetting",
    "recover",
    "transfer",
    "linear-model",
    "trim",
    "compact",
    "export",
    "merge",
    "serve-check",
    "push",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", tiny.rows(16))


def saved_adapter(method: str, model: Path, folder: Path) -> Path:
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    config = adapter_config(method, r=3, target_modules=["q_proj", "v_proj"])
    adapted = peft.get_peft_model(base, config)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and ("_up" in name or "lora_B" in name):
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    return folder


def test_help_lists_every_command_with_what_it_is_for(program: Program) -> None:
    shown = program("--help")
    assert shown.code == 0
    for name in COMMANDS:
        assert f" {name} " in shown.out
    assert {command.name for command in app.registered_commands} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_teaches_with_an_example(name: str, program: Program) -> None:
    shown = program(name, "--help")
    assert shown.code == 0
    assert "Example" in shown.out
    assert f"dynalora {name} " in shown.out.split("Example", 1)[1]
    assert "--config" in shown.out
    assert "\x1b" not in shown.out


EXPLAINED = [
    *(
        pytest.param(item.summary, id=f"{name} {item.name}")
        for name, command in TABLE.items()
        for item in describe(command.settings).values()
    ),
    *(
        pytest.param(field.metadata["help"], id=f"{name} {field.name}")
        for name, method in METHODS.items()
        for field in dataclasses.fields(method.config_class)
        if field.name in vars(method.config_class).get("__annotations__", {}) and "help" in field.metadata
    ),
]


@pytest.mark.parametrize("text", EXPLAINED)
def test_a_setting_is_explained_in_whole_sentences(text: str) -> None:
    """A sentence that says what to do; not a noun, such as "Number of steps." or "Of the start."."""
    assert text[0].isupper()
    assert text.endswith(".")
    assert len(text.split()) >= 4, text
    assert text.split()[0] not in {"A", "An", "Data", "The", "Of", "Number", "Name", "Rank", "Seed", "Whether", "How"}


def test_help_of_finetune_names_every_method(program: Program) -> None:
    shown = program("finetune", "--help")
    for name in method_names():
        assert name in shown.out


def test_no_arguments_show_help(program: Program) -> None:
    assert "Commands" in program().out
    assert "--data" in program("finetune").out


def test_version(program: Program) -> None:
    assert program("--version").out == f"dynalora {__version__}\n"


def test_unknown_flag_is_a_usage_error(program: Program) -> None:
    shown = program("finetune", "--modle", "x")
    assert shown.code == 2
    assert "--modle" in shown.err
    assert "--model" in shown.err


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The jobs that the commands would run."""
    jobs: list[Any] = []
    monkeypatch.setattr(finetune, "finetune", lambda spec, **_: jobs.append(spec))
    monkeypatch.setattr(demo, "run_demo", lambda spec, **_: jobs.append(spec))
    return jobs


def test_flags_override_the_file(asked: list[Any], tmp_path: Path, program: Program) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        "model: a\ndata: b\noutput: c\nlearning_rate: 1e-3\nmethod: dira\n"
        "method_options: {penalty_weight: 1e-5, penalty: product}\n"
    )
    shown = program(
        "finetune", "--config", str(file), "--lr", "5e-4", "-o", "d", "-r", "4", "-t", "q_proj,v_proj",
        "--no-retention", "-O", "penalty_weight=1e-2", "--gradient-checkpointing",
    )  # fmt: skip
    assert shown.code == 0, shown.err
    (spec,) = asked
    assert (spec.model, spec.output, spec.learning_rate, spec.r) == ("a", "d", 5e-4, 4)
    assert spec.target_modules == ["q_proj", "v_proj"]
    assert spec.method_options == {"penalty_weight": "1e-2", "penalty": "product"}
    assert spec.gradient_checkpointing
    assert not spec.retention
    assert adapter_config("dira", options=spec.method_options).penalty_weight == 1e-2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_setting_has_a_flag_with_a_sentence(name: str) -> None:
    import dataclasses

    program: Any = typer.main.get_command(app)
    command = program.commands[name]
    assert command.params == []  # until they are asked for
    flags = {item.name: item for item in command.get_params(typer.Context(command))}
    settings = {item.name for item in dataclasses.fields(TABLE[name].settings)}
    assert set(flags) - {"config", "help"} == settings
    for setting in settings:
        assert re.match(r"[A-Z].*\.( |$)", flags[setting].help), setting
        assert flags[setting].default is None  # the class alone has the default


def test_help_shows_the_defaults_of_the_command_itself(program: Program) -> None:
    def default_of(command: str, flag: str) -> str:
        rows = program(command, "--help").out.split(f" --{flag} ", 1)[1].split("│ --", 1)[0]
        return " ".join(rows.replace("│", " ").split()).rpartition("[default: ")[2].split("]")[0]

    assert default_of("forgetting", "held-out") == "200"
    assert default_of("recover", "held-out") == default_of("recover", "dtype") == "SOURCE's"
    assert default_of("recover", "learning-rate,--lr") == "0.0001"
    assert default_of("compare", "steps") == "100"
    assert default_of("demo", "steps") == "40"
    assert default_of("finetune", "steps") == "as many as the epochs need"
    assert default_of("compare", "by-generation") == "by-likelihood"


@pytest.mark.parametrize("name", ["eval_every", "save_every", "log_every"])
def test_compare_refuses_what_it_would_ignore(name: str, tmp_path: Path, program: Program) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(f"tasks: [sst2]\noutput: {tmp_path}/out\n{name}: 5\n")
    shown = program("compare", "--config", str(file))
    assert shown.code == 2
    assert f"{name} is 5, and this experiment does not use it" in shown.err
    flag = f"--{name.replace('_', '-')}"
    assert f"No such option: {flag}" in program("compare", "--tasks", "sst2", "-o", "x", flag, "5").err


def test_every_job_exists_and_takes_settings_and_a_console() -> None:
    for command in TABLE.values():
        module, _, function = command.job.partition(":")
        parameters = inspect.signature(getattr(importlib.import_module(module), function)).parameters
        assert next(iter(parameters)) == "spec"
        assert "console" in parameters


def test_without_the_extra_one_sentence_says_what_to_install() -> None:
    program = "import sys; sys.modules['typer'] = None; from dynalora.cli.main import main; main()"
    code = f"import sys; sys.path.insert(0, {str(Path(dynalora.__file__).parents[1])!r}); {program}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert "needs the package typer, which is not installed" in line
    assert "pip install 'dynalora[lab]'" in line
    assert "pip install '.[lab]'" in line
    assert "Traceback" not in done.stderr


def test_the_extra_brings_what_the_program_needs_and_the_core_does_not() -> None:
    tomllib = pytest.importorskip("tomllib")  # new in Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[<>=\[]", requirement)[0] for requirement in requirements}

    core = names(project["dependencies"])
    assert core == {"torch", "peft", "transformers", "accelerate", "safetensors", "numpy"}
    extras = project["optional-dependencies"]
    needed = {"pyyaml" if module == "yaml" else module for module in main.NEEDED}
    assert needed <= names(extras["lab"])
    for name in ("demo", "eval"):
        assert "dynalora[lab]" in extras[name]
    oldest = {line.split("==")[0] for line in (ROOT / "constraints-oldest.txt").read_text().splitlines()}
    assert core | names(extras["lab"]) <= oldest


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dynalora", "--version"],
        env={**os.environ, "PYTHONPATH": str(Path(dynalora.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"dynalora {__version__}\n")


def test_demo_takes_lists_with_commas(asked: list[Any], program: Program) -> None:
    assert program("demo", "--methods", "dira, lora", "--steps", "3", "-o", "x").code == 0
    assert asked[0].methods == ["dira", "lora"]
    assert asked[0].steps == 3


def test_finetune_from_the_command_line(folder: Path, rows: Path, tmp_path: Path, program: Program) -> None:
    output = tmp_path / "run"
    shown = program(
        "finetune", "-m", str(folder), "-d", str(rows), "-o", str(output), "--method", "dira", "--steps", "4",
        "-b", "2", "-r", "2", "--no-retention", "--eval-fraction", "0.25",
    )  # fmt: skip
    assert shown.code == 0, shown.err
    assert shown.err == ""
    assert "dira" in shown.out
    assert f"Report:  {output / 'report.html'}" in shown.out
    assert "\x1b" not in shown.out
    assert yaml.safe_load((output / "config.yaml").read_text())["method"] == "dira"
    # What other commands make of it.
    exported = program("export", str(output), str(tmp_path / "lora"))
    assert exported.code == 0, exported.err
    assert "a plain LoRA of 14 matrices, rank 2" in exported.out
    ranks = program("export", str(output), str(tmp_path / "ranks.json"), "--ranks-only")
    assert ranks.code == 0, ranks.err
    assert "the ranks of 14 matrices" in ranks.out
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    drawn = program("landscape", str(output), "--plot", str(tmp_path / "ranks.png"), "--tau", "0")
    assert drawn.code == 0, drawn.err
    assert "q_proj" in drawn.out
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


def test_interrupted_run_says_how_to_go_on(
    folder: Path, rows: Path, tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "load_model", interrupted)
    shown = program("finetune", "-m", str(folder), "-d", str(rows), "-o", str(tmp_path / "run"))
    assert shown.code == 130
    assert shown.err == f"Interrupted; continue with: dynalora finetune --config {tmp_path}/run/config.yaml --resume\n"


def test_gates_of_an_adapter(folder: Path, rows: Path, tmp_path: Path, program: Program) -> None:
    adapter = saved_adapter("disel", folder, tmp_path / "adapter")
    shown = program("gates", str(adapter), "--data", str(rows), "--limit", "4", "--plot", str(tmp_path / "gates.png"))
    assert shown.code == 0, shown.err
    table = {
        line.split()[0]: line.split()[1:]
        for line in shown.out.splitlines()
        if line.split()[:1] in (["q_proj"], ["all"])
    }
    assert 0 < float(table["q_proj"][0]) < 1  # of all layers; the tiny model has none in the third part
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")


def test_gates_over_several_domains(folder: Path, rows: Path, tmp_path: Path, program: Program) -> None:
    adapter = saved_adapter("disel", folder, tmp_path / "adapter")
    (tmp_path / "wiki.txt").write_text("One passage.\nIts second line.\n\n\nAnother <b>passage</b>.\n")
    run = tmp_path / "run"
    shown = program(
        "gates", str(adapter), "--domain", f"math={rows}", "--domain", f"general={tmp_path / 'wiki.txt'}",
        "--limit", "5", "-o", str(run), "-b", "2",
    )  # fmt: skip
    assert shown.code == 0, shown.err
    assert "A token of math opens the gates further than a token of general with probability 0." in shown.out
    content = json.loads((run / "gates.json").read_text())
    general = content["domains"]["general"]
    assert (general["documents"], general["counted"]) == (2, "all tokens")
    assert general["tokens"] == len("One passage.\nIts second line.") + len("Another <b>passage</b>.")
    assert content["domains"]["math"]["counted"] == "response tokens"
    assert content["domains"]["math"]["documents"] == 5
    (layer, *_) = content["domains"]["math"]["layers"]
    assert layer["mean"] == pytest.approx(sum(layer["mean_per_rank"]) / 3)
    assert sum(layer["histogram"]) == 3 * layer["tokens"]
    with open(run / "layers.csv", newline="") as file:
        assert float(next(csv.DictReader(file))["mean"]) == layer["mean"]
    with open(run / "ranks.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * 4 * 3
    with open(run / "separation.csv", newline="") as file:
        pairs = list(csv.DictReader(file))
    assert {row["pair"] for row in pairs} == {"math / general"}
    assert all(0 <= float(row["auc"]) <= 1 for row in pairs)
    tensors = load_file(run / "histograms.safetensors")
    (name,) = [name for name in tensors if name.startswith("math") and "0.self_attn.q_proj/rank" in name]
    assert tensors[name].sum(0).tolist() == layer["histogram"]
    drawn = {entry.name for entry in (run / "plots").iterdir()}
    names = ("gates", "means", "separation", "kinds-math", "kinds-general", "ranks-math", "ranks-general")
    names += ("parts-math", "parts-general")
    assert drawn == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    page = (run / "report.html").read_text()
    assert page.count("data:image/svg+xml") == len(names)
    # The folder's own settings file repeats the run.
    again = program("gates", "-c", str(run / "config.yaml"), "-o", str(tmp_path / "again"))
    assert again.code == 0, again.err
    assert json.loads((tmp_path / "again" / "gates.json").read_text()) == content


def test_gates_tells_what_is_wrong_with_the_domains(folder: Path, rows: Path, tmp_path: Path, program: Program) -> None:
    adapter = str(saved_adapter("disel", folder, tmp_path / "adapter"))
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "job.yaml").write_text(f"adapter: {adapter}\ndomains:\n  a: {{data: x.jsonl, fields: y}}\n")
    for flags, words in (
        ([], "(neither is given): --domain NAME=SOURCE"),
        (["--data", str(rows), "--domain", f"a={rows}"], "(both are given)"),
        (["--domain", str(rows)], "is not of the form NAME=SOURCE"),
        (["--domain", f"a={rows}", "--domain", f"a={rows}"], "The domain 'a' is given twice"),
        (["--domain", f"a={tmp_path}/none.txt"], "There is no file or folder"),
        (["--domain", f"a={tmp_path}/empty.txt"], "holds no text"),
        (["--domain", f"a={rows}", "--max-length", "1"], "--max-length is 1"),
        (["-c", str(tmp_path / "job.yaml")], "Unknown setting 'fields' in the domain 'a'"),
    ):
        shown = program("gates", adapter, *flags)
        assert (shown.code, words in shown.err) == (2, True), (flags, shown.err)


def test_landscape_of_a_plain_lora(folder: Path, tmp_path: Path, program: Program) -> None:
    shown = program("landscape", str(saved_adapter("lora", folder, tmp_path / "adapter")))
    assert shown.code == 0, shown.err
    kinds = {line.split()[0]: line.split()[1:] for line in shown.out.splitlines() if line.strip()}
    assert kinds["v_proj"][:5] == ["2", "3.00", "3", "3", "3.0"]


def test_landscapes_side_by_side(folder: Path, rows: Path, tmp_path: Path, program: Program) -> None:
    gated = saved_adapter("disel", folder, tmp_path / "one" / "adapter")
    plain = saved_adapter("lora", folder, tmp_path / "two" / "adapter")
    shown = program(
        "landscape", str(gated), str(plain), "--taus", "0.1,0.01", "--data", str(rows), "--limit", "4",
        "--plot", str(tmp_path / "drawn.png"), "--csv", str(tmp_path / "l.csv"), "--json", str(tmp_path / "l.json"),
    )  # fmt: skip
    assert shown.code == 0, shown.err
    assert "one/adapter: with mean gates on rows.jsonl" in " ".join(shown.out.split())
    records = json.loads((tmp_path / "l.json").read_text())
    assert [record["run"] for record in records] == ["one/adapter"] * 4 + ["two/adapter"] * 4
    assert len(records[0]["singular_values"]) == 3
    assert {record["effect_rank"] for record in records} <= {1, 2, 3}
    assert "99 % of the effect" in " ".join(shown.out.split())
    with open(tmp_path / "l.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["nuclear_norm"]) for line in lines] == [record["nuclear_norm"] for record in records]
    made = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("drawn"))
    assert made == [
        f"drawn{which}.{ending}"
        for which in ("-effect_rank", "-energy", "-energy_rank", "-entropy_rank", "-nuclear_norm", "-stable_rank", "")
        for ending in ("png", "svg")
    ]
    # With its mean gates a DISeL adapter is less than with all of them open.
    whole = program("landscape", str(gated), "--json", str(tmp_path / "open.json"))
    assert "with all gates open, the most that the update can be" in " ".join(whole.out.split())
    opened = json.loads((tmp_path / "open.json").read_text())
    assert "effect_rank" not in opened[0]
    assert opened[0]["nuclear_norm"] > records[0]["nuclear_norm"] > 0


def test_landscape_of_two_full_models(folder: Path, tmp_path: Path, program: Program) -> None:
    import transformers

    tuned = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        tuned.model.layers[0].self_attn.q_proj.weight[0, 0] += 0.5
    tuned.save_pretrained(tmp_path / "tuned")
    shown = program(
        "landscape", str(tmp_path / "tuned"), "--against", str(folder), "--modules", "q_proj",
        "--json", str(tmp_path / "l.json"),
    )  # fmt: skip
    assert shown.code == 0, shown.err
    records = json.loads((tmp_path / "l.json").read_text())
    assert [(record["layer"], record["effective_rank"]) for record in records] == [(0, 1), (1, 0)]
    assert records[0]["nuclear_norm"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--modules", "q_proj"], "--modules chooses matrices of full models"),
        (["--against", "base", "--data", "rows.jsonl"], "--data and --model belong to adapters"),
        (["--tau", "-1"], "--tau is -1; give at least 0."),
        (["--taus", "0.1,x"], "taus must be numbers"),
        (["--against", "./nowhere"], "There is no model './nowhere'"),
    ],
)
def test_landscapes_that_cannot_be(flags: list[str], message: str, program: Program) -> None:
    shown = program("landscape", "runs/first", *flags)
    assert shown.code == 2
    assert message in shown.err


def test_data_measure_the_effect_of_an_adapter_without_gates(
    folder: Path, rows: Path, tmp_path: Path, program: Program
) -> None:
    plain = saved_adapter("lora", folder, tmp_path / "adapter")
    shown = program("landscape", str(plain), "--data", str(rows), "--csv", str(tmp_path / "l.csv"))
    assert shown.code == 0, shown.err
    with open(tmp_path / "l.csv", encoding="utf-8") as file:
        assert {line["effect_rank"] for line in csv.DictReader(file)} <= {"1", "2", "3"}


def test_bench_from_the_command_line(folder: Path, tmp_path: Path, program: Program) -> None:
    shown = program(
        "bench", "-m", str(folder), "--methods", "lora,disel", "--dtypes", "float32", "-r", "2", "-b", "1", "-l", "8",
        "--rounds", "2", "--warmup", "1", "--no-memory", "--device", "cpu", "--json", str(tmp_path / "bench.json"),
    )  # fmt: skip
    assert shown.code == 0, shown.err
    assert "step / lora" in shown.out
    assert len(json.loads((tmp_path / "bench.json").read_text())["results"]) == 2


def test_generation_bench_from_the_command_line(folder: Path, tmp_path: Path, program: Program) -> None:
    shown = program(
        "bench", "--generate", "-m", str(folder), "--methods", "lora,disel", "--dtypes", "float32", "-r", "2",
        "-b", "1", "-l", "8", "--new-tokens", "3", "--rounds", "2", "--warmup", "1", "--device", "cpu", "--json",
        str(tmp_path / "generation.json"),
    )  # fmt: skip
    assert shown.code == 0, shown.err
    assert "token / lora" in shown.out
    results = json.loads((tmp_path / "generation.json").read_text())["results"]
    assert [len(result["token_seconds"]) for result in results] == [2, 2]


def test_compaction_from_the_command_line(folder: Path, tmp_path: Path, program: Program) -> None:
    adapter = saved_adapter("dira", folder, tmp_path / "adapter")
    shown = program("compact", str(adapter), str(tmp_path / "small"), "--threshold", "0.9", "--no-rewrite")
    assert shown.code == 0, shown.err
    kinds = {line.split()[0]: line.split()[1:] for line in shown.out.splitlines() if line.strip()}
    assert kinds["q_proj"][:2] == ["2", "3.00"]
    assert float(kinds["all"][2]) < 3
    ranks = json.loads((tmp_path / "small" / "adapter_config.json").read_text())["rank_pattern"]
    assert f"{4 * 3 - sum(ranks.values()) - 3 * (4 - len(ranks))} components removed" in shown.out
    refused = program("compact", str(saved_adapter("lora", folder, tmp_path / "lora")), str(tmp_path / "x"))
    assert refused.code == 2
    assert "none of dynalora's methods" in refused.err


def test_ranks_only_refuses_what_it_would_ignore(folder: Path, tmp_path: Path, program: Program) -> None:
    adapter = str(saved_adapter("dira", folder, tmp_path / "adapter"))
    for flags in (["--max-rank", "2"], ["--tolerance", "0.1"], ["--uniform-rank", "0"], ["--dtype", "float16"]):
        shown = program("export", adapter, str(tmp_path / "ranks.json"), "--ranks-only", *flags)
        assert shown.code == 2
        assert f"and {flags[0]} would change" in shown.err
    assert not (tmp_path / "ranks.json").exists()


def test_export_says_who_can_serve_it(folder: Path, tmp_path: Path, program: Program) -> None:
    adapter = str(saved_adapter("dira", folder, tmp_path / "adapter"))
    shown = program("export", adapter, str(tmp_path / "lora"), "--uniform-rank", "8", "--dtype", "bfloat16")
    assert shown.code == 0, shown.err
    assert "rank 8" in shown.out
    *servers, loading = shown.out.splitlines()[-4:]
    assert servers == [
        "vLLM: yes (--max-lora-rank 8)", "SGLang: yes (--enable-lora --lora-paths NAME=FOLDER)", "llama.cpp: yes",
    ]  # fmt: skip
    call = loading.removeprefix("Load it with PEFT alone: ")
    assert call == f"AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / 'lora')!r})"
    loaded = eval(call, {"AutoPeftModelForCausalLM": peft.AutoPeftModelForCausalLM})
    assert loaded.peft_config["default"].peft_type == "LORA"


def test_snapshot_of_gates_from_the_command_line(folder: Path, rows: Path, tmp_path: Path, program: Program) -> None:
    adapter = str(saved_adapter("disel", folder, tmp_path / "adapter"))
    refused = program("export", adapter, str(tmp_path / "lora"))
    assert refused.code == 2
    assert "--calibrate" in refused.err
    shown = program("export", adapter, str(tmp_path / "lora"), "--calibrate", str(rows), "--limit", "6")
    assert shown.code == 0, shown.err
    assert "gated ‖ snapshot" in shown.out
    assert "other rows" in shown.out
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    other = tiny.write_jsonl(tmp_path / "other.jsonl", tiny.rows(4))
    shown = program(
        "export", adapter, str(tmp_path / "again"), "--calibrate", str(rows), "--measure", str(other), "--measure",
        str(rows),
    )  # fmt: skip
    assert shown.code == 0, shown.err
    measured = [line.split()[0] for line in shown.out.splitlines() if ".jsonl" in line]
    assert measured[:2] == ["other.jsonl", "rows.jsonl"]
    alone = program("export", adapter, str(tmp_path / "third"), "--measure", str(other))
    assert "needs --calibrate" in alone.err
    static = str(saved_adapter("dira", folder, tmp_path / "static"))
    assert "which has none and is exported exactly" in program("export", static, "x", "--calibrate", str(rows)).err


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the program with other standard streams than it has; the exit code."""

    def run(*arguments: str, **given: Any) -> int:
        for name, stream in given.items():
            monkeypatch.setattr(sys, name, stream)
        monkeypatch.setattr(sys, "argv", ["dynalora", *arguments])
        with pytest.raises(SystemExit) as end:
            main.main()
        return int(end.value.code or 0)

    return run


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_letters_that_an_encoding_lacks_are_written_as_numbers(
    encoding: str, streams: Callable[..., int], program: Program
) -> None:
    screen, complaints = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    assert streams("finetune", "--help", stdout=screen) == 0
    assert streams("export", "nothing \u2026 here", "out", stderr=complaints) == 2
    screen.flush()
    complaints.flush()
    assert b"--method" in screen.buffer.getvalue()  # type: ignore[attr-defined]
    assert b"nothing \\u2026 here" in complaints.buffer.getvalue()  # type: ignore[attr-defined]


def test_without_standard_error_the_program_ends_as_with_it(streams: Callable[..., int], program: Program) -> None:
    assert streams("finetune", "--nothing-of-this-name", stderr=None) == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_help_page_for_a_full_disk(streams: Callable[..., int], program: Program) -> None:
    with open("/dev/full", "w", encoding="utf-8", buffering=1) as full:
        complaints = io.StringIO()
        assert streams("--help", stdout=full, stderr=complaints) == 2
        assert complaints.getvalue().startswith("Error: There is no room left")
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


def test_a_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: Program) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    shown = program("export", "adapter", "out")
    assert (shown.code, shown.err) == (
        2,
        "Error: The current folder does not exist any more; change to one that does.\n",
    )
    assert program("--version").code == 0


def test_the_program_can_be_imported_from_where_it_starts() -> None:
    assert main.app is app
    with pytest.raises(AttributeError, match="nothing"):
        main.nothing  # noqa: B018
