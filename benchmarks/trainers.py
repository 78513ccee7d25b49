"""The table of trainers × methods in `docs/integrations.md`, made by training a tiny model in each of its cells.

    python benchmarks/trainers.py
    python benchmarks/trainers.py --trainers loop,trl-sft --methods lora,pedyra

A cell trains six steps and saves after three; goes on from there in a new model, which must end at the same weights;
merges, which must change no output; and exports a plain LoRA, which stock PEFT must load with the same outputs. A
letter means that it did so, a dash that the method refuses it in a sentence, a cross that something else happened.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("DYNALORA_DECOMPOSITION_CACHE_GIB", "0")

import peft
import torch
import transformers
from torch import nn

import dynalora
from dynalora.adapter.layer import adapter_layers
from dynalora.errors import DynaloraError

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import tiny

STEPS, SAVED = 6, 3
METHODS: dict[str, tuple[type, dict[str, Any]]] = {
    "lora": (peft.LoraConfig, {"lora_alpha": 8}),
    "dira": (dynalora.DiraConfig, {"target_rank": 0.5, "total_steps": STEPS}),
    "disel": (dynalora.DiselConfig, {"gate_bias_init": 0.0}),
    "dislora": (dynalora.DisloraConfig, {"warmup_steps": 2, "tsd_count": 2}),
    "pedyra": (dynalora.PedyraConfig, {"adjust_start": 1, "adjust_interval": 1, "adjust_end": 4, "adjust_size": 2}),
}
TITLES = {"lora": "LoRA", "dira": "DiRA", "disel": "DISeL", "dislora": "DisLoRA", "pedyra": "PE-DyRA"}

Config = Any
Trained = Any


def config_of(method: str, **options: Any) -> Config:
    """A method's configuration with something to do in six steps."""
    kind, more = METHODS[method]
    return kind(**{"r": 4, "target_modules": "all-linear", **more, **options})


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What trains."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# Loops -----------------------------------------------------------------------------------------------------------


def loop(config: Config, folder: Path, resume: bool) -> Trained:
    """A loop of one's own on a causal language model."""
    config.task_type = "CAUSAL_LM"
    base = tiny.causal_model()
    if resume:
        model = peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    else:
        model = peft.get_peft_model(base, config)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    if resume:
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    model.train()
    for number, batch in enumerate(tiny.batches(STEPS)):
        if resume and number < SAVED:
            continue
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number + 1 == SAVED and not resume:
            model.save_pretrained(folder / "adapter")
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return model


def with_accelerate(config: Config, folder: Path, resume: bool) -> Trained:
    """Accelerate, with its own checkpoints."""
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    model = peft.get_peft_model(tiny.causal_model(), config)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    if resume:
        accelerator.load_state(str(folder / "state"))
    model.train()
    for number, batch in enumerate(tiny.batches(STEPS)):
        if resume and number < SAVED:
            continue
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        if number + 1 == SAVED and not resume:
            accelerator.save_state(str(folder / "state"))
    return accelerator.unwrap_model(model)


def with_lightning(config: Config, folder: Path, resume: bool) -> Trained:
    """Lightning, with its own checkpoints."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = peft.get_peft_model(tiny.causal_model(), config)

        def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(**batch).loss
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(trainable(self), lr=1e-2)

    saving = lightning.pytorch.callbacks.ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=SAVED, save_top_k=-1
    )
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=STEPS, logger=False, callbacks=[saving], enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    module = Module()
    loader = torch.utils.data.DataLoader(tiny.batches(SAVED), batch_size=None)  # one saves between epochs
    trainer.fit(module, loader, ckpt_path=str(folder / f"step={SAVED}.ckpt") if resume else None, weights_only=False)
    return module.model


def with_diffusers(config: Config, folder: Path, resume: bool) -> Trained:
    """A loop on a UNet of diffusers, with `add_adapter`."""
    import diffusers

    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, in_channels=4, out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=8, attention_head_dim=8,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=16,
    ).requires_grad_(False)  # fmt: skip
    config.target_modules = {"to_q", "to_k", "to_v", "to_out.0"}
    model.add_adapter(config)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    if resume:
        saved = torch.load(folder / "state.pt", weights_only=True)
        peft.set_peft_model_state_dict(model, saved["adapter"])
        optimizer.load_state_dict(saved["optimizer"])
    image, rest = torch.randn(2, 4, 8, 8), (torch.tensor([3, 5]), torch.randn(2, 5, 16))
    model.inputs = {"sample": image, "timestep": rest[0], "encoder_hidden_states": rest[1]}
    for number in range(SAVED if resume else 0, STEPS):
        (model(image, *rest).sample - image).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if number + 1 == SAVED and not resume:
            adapter = {key: tensor.clone() for key, tensor in peft.get_peft_model_state_dict(model).items()}
            torch.save({"adapter": adapter, "optimizer": optimizer.state_dict()}, folder / "state.pt")
    return model


# transformers' Trainer and what is built on it -------------------------------------------------------------------


def arguments(folder: Path, **options: Any) -> dict[str, Any]:
    """Settings that all trainers take."""
    usual = {
        "output_dir": str(folder), "max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVED, "use_cpu": True,
        "learning_rate": 1e-2, "per_device_train_batch_size": 2, "report_to": [], "logging_strategy": "no",
        "disable_tqdm": True,
    }  # fmt: skip
    return usual | options


def run(trainer: Any, folder: Path, resume: bool) -> Trained:
    """Train, or go on from the checkpoint that lies there."""
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED}") if resume else None)
    return trainer.model


def rows() -> list[dict[str, Any]]:
    """Token ids with labels."""
    return [{key: tensor[0] for key, tensor in batch.items()} for batch in tiny.batches(16, size=1)]


def with_trainer(config: Config, folder: Path, resume: bool) -> Trained:
    """transformers' own."""
    config.task_type = "CAUSAL_LM"
    model = peft.get_peft_model(tiny.causal_model(), config)
    settings = transformers.TrainingArguments(**arguments(folder))
    return run(transformers.Trainer(model, settings, train_dataset=rows()), folder, resume)


def with_add_adapter(config: Config, folder: Path, resume: bool) -> Trained:
    """transformers' own, on a model with `add_adapter`."""
    model = tiny.causal_model()
    model.add_adapter(config)
    settings = transformers.TrainingArguments(**arguments(folder))
    return run(transformers.Trainer(model, settings, train_dataset=rows()), folder, resume)


def with_seq2seq(config: Config, folder: Path, resume: bool) -> Trained:
    """transformers' trainer of encoder-decoders, on a T5."""
    torch.manual_seed(0)
    base = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=len(tiny.tokenizer()), d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
            decoder_start_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip
    config.task_type = "SEQ_2_SEQ_LM"
    model = peft.get_peft_model(base, config)
    settings = transformers.Seq2SeqTrainingArguments(**arguments(folder))
    return run(transformers.Seq2SeqTrainer(model, settings, train_dataset=rows()), folder, resume)


def with_sentence_transformers(config: Config, folder: Path, resume: bool) -> Trained:
    """sentence-transformers, with `add_adapter`."""
    import datasets
    import sentence_transformers as st
    from sentence_transformers import losses
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    place = str(folder / "base")  # its checkpoints say where the base model is
    if not resume:
        tiny.encoder().save_pretrained(place)
        tiny.tokenizer().save_pretrained(place)
    encoder = Transformer(place)
    model = st.SentenceTransformer(modules=[encoder, Pooling(32)], device="cpu")
    model.add_adapter(config)
    pairs = datasets.Dataset.from_dict({"anchor": tiny.TEXTS, "positive": tiny.TEXTS[1:] + tiny.TEXTS[:1]})
    trainer = st.SentenceTransformerTrainer(
        model, st.SentenceTransformerTrainingArguments(**arguments(folder)), train_dataset=pairs,
        loss=losses.MultipleNegativesRankingLoss(model),
    )  # fmt: skip
    return run(trainer, folder, resume)[0].auto_model


TEXT = {"text": tiny.TEXTS}
PROMPTS = [f"After {number} comes " for number in range(16)]
PAIRS = {
    "prompt": PROMPTS,
    "chosen": [f"{number + 1}." for number in range(16)],
    "rejected": ["nothing." for _ in range(16)],
}
JUDGED = {"prompt": PROMPTS, "completion": PAIRS["chosen"], "label": [number % 2 == 0 for number in range(16)]}


def short(completions: list[Any], **_: Any) -> list[float]:
    """A reward that differs between completions."""
    return [-float(len(set(str(completion)))) for completion in completions]


def of_trl(kind: str, data: dict[str, list[Any]], *, module: str = "trl", **options: Any) -> Callable[..., Trained]:
    """One of TRL's trainers, which is given a `peft_config`."""

    def train(config: Config, folder: Path, resume: bool) -> Trained:
        import datasets

        place = importlib.import_module(module)
        settings = getattr(place, f"{kind}Config")(**arguments(folder, bf16=False, **options))
        given: dict[str, Any] = {"reward_funcs": short} if kind in ("GRPO", "RLOO") else {}
        config.task_type = "SEQ_CLS" if kind == "Reward" else "CAUSAL_LM"
        model = _judge() if kind == "Reward" else tiny.causal_model()
        trainer = getattr(place, f"{kind}Trainer")(
            model, args=settings, train_dataset=datasets.Dataset.from_dict(data), processing_class=tiny.tokenizer(),
            peft_config=config, **given,
        )  # fmt: skip
        return run(trainer, folder, resume)

    return train


def _judge() -> Any:
    """A model with one number as its result."""
    torch.manual_seed(0)
    config = tiny.causal_model().config
    config.num_labels = 1
    return transformers.LlamaForSequenceClassification(config)


POLICY = {"num_generations": 2, "max_completion_length": 8}


@dataclass(frozen=True)
class Trainer:
    """A row of the table.

    Attributes:
        title: What the table calls it.
        train: Trains, or goes on with, an adapter of a configuration, in a folder.
        needs: The package that it is of.
    """

    title: str
    train: Callable[[Config, Path, bool], Trained]
    needs: str = "transformers"


TRAINERS = {
    "loop": Trainer("a loop of one's own", loop),
    "accelerate": Trainer("Accelerate", with_accelerate, "accelerate"),
    "lightning": Trainer("Lightning", with_lightning, "lightning"),
    "diffusers": Trainer("a loop on diffusers' UNet", with_diffusers, "diffusers"),
    "trainer": Trainer("transformers, `Trainer`", with_trainer),
    "add-adapter": Trainer("`Trainer` after `model.add_adapter`", with_add_adapter),
    "seq2seq": Trainer("transformers, `Seq2SeqTrainer`", with_seq2seq),
    "sentence": Trainer("sentence-transformers", with_sentence_transformers, "sentence_transformers"),
    "trl-sft": Trainer("TRL, `SFTTrainer`", of_trl("SFT", TEXT, max_length=32), "trl"),
    "trl-dpo": Trainer("TRL, `DPOTrainer`", of_trl("DPO", PAIRS, max_length=32), "trl"),
    "trl-kto": Trainer("TRL, `KTOTrainer`", of_trl("KTO", JUDGED, max_length=32), "trl"),
    "trl-reward": Trainer("TRL, `RewardTrainer`", of_trl("Reward", PAIRS, max_length=32), "trl"),
    "trl-grpo": Trainer("TRL, `GRPOTrainer`", of_trl("GRPO", {"prompt": PROMPTS}, beta=0.1, **POLICY), "trl"),
    "trl-rloo": Trainer("TRL, `RLOOTrainer`", of_trl("RLOO", {"prompt": PROMPTS}, **POLICY), "trl"),
    "trl-orpo": Trainer(
        "TRL, `ORPOTrainer`", of_trl("ORPO", PAIRS, module="trl.experimental.orpo", max_length=32), "trl"
    ),
    "trl-cpo": Trainer("TRL, `CPOTrainer`", of_trl("CPO", PAIRS, module="trl.experimental.cpo", max_length=32), "trl"),
}


# A cell ----------------------------------------------------------------------------------------------------------


def outputs(model: Any) -> torch.Tensor:
    """What a model says to a fixed input."""
    inputs = getattr(model, "inputs", None)
    if inputs is None:
        ids = tiny.batches(1)[0]["input_ids"]
        inputs = {"input_ids": ids}
        if getattr(model.config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        result: torch.Tensor = model.eval()(**inputs)[0]
    return result


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether outputs are the same but for the order of summation."""
    return torch.allclose(one, other, atol=1e-4, rtol=1e-4)


def trained_well(model: Any) -> bool:
    """Whether the method counted every step, and the weights are numbers."""
    steps = {report.step for report in dynalora.state_report(model) if report.adapter == "default"}
    return steps <= {STEPS} and all(bool(parameter.isfinite().all()) for parameter in trainable(model))


def same_weights(one: Any, other: Any) -> bool:
    """Whether two models have the same trained weights."""
    pairs = list(zip(trainable(one), trainable(other), strict=True))
    return bool(pairs) and all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in pairs)


def merges(model: Any) -> bool:
    """Whether merging changes no output."""
    before = outputs(model)
    if isinstance(model, peft.PeftModel):
        return close(outputs(model.merge_and_unload()), before)
    tuners = [module for module in model.modules() if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)]
    for layer in tuners:
        layer.merge(safe_merge=True)
    same = close(outputs(model), before)
    for layer in tuners:
        layer.unmerge()
    return same


def exports(model: Any, base: Any, folder: Path) -> bool:
    """Whether what is exported does the same under stock PEFT."""
    if not adapter_layers(model):
        return True  # it is a LoRA
    before = outputs(model)
    dynalora.export_lora(model, folder)
    loaded = peft.PeftModel.from_pretrained(base, folder)
    if hasattr(model, "inputs"):
        loaded.inputs = model.inputs
    return close(outputs(loaded), before)


def base_of(model: Any) -> Any:
    """The model without its adapter, in a copy."""
    copied = copy.deepcopy(model)
    if isinstance(copied, peft.PeftModel):
        return copied.unload()
    parents = {name: module for name, module in copied.named_modules()}
    for name, module in list(parents.items()):
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            parent, _, last = name.rpartition(".")
            setattr(parents[parent], last, module.get_base_layer())
    copied.__dict__.pop("peft_config", None)
    copied._hf_peft_config_loaded = False
    return copied


def attempt(what: Callable[[], bool]) -> str:
    """`yes`, `refused`, or what went wrong."""
    try:
        return "yes" if what() else "another result"
    except (DynaloraError, NotImplementedError, ValueError) as error:
        refused = isinstance(error, DynaloraError)
        return "refused" if refused else f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def cell(trainer: str, method: str) -> dict[str, str]:
    """Train, resume, merge and export.

    Args:
        trainer: A key of `TRAINERS`.
        method: A key of `METHODS`.

    Returns:
        `yes`, `refused` or what went wrong, for each of the four.
    """
    row = TRAINERS[trainer]
    results: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder, models = Path(place), {}

        def train(resume: bool) -> bool:
            torch.manual_seed(7)
            models[resume] = row.train(config_of(method), folder, resume)
            return trained_well(models[resume])

        results["train"] = attempt(lambda: train(False))
        if False not in models:
            return results
        results["resume"] = attempt(lambda: train(True) and same_weights(models[False], models[True]))
        model = models[False]
        base = base_of(model)
        results["export"] = attempt(lambda: exports(model, base, folder / "exported"))
        results["merge"] = attempt(lambda: merges(model))
    return results


def mark(results: dict[str, str]) -> str:
    """A cell as the table has it."""
    signs = []
    for what in ("train", "resume", "merge", "export"):
        said = results.get(what, "")
        signs.append({"yes": what[0].upper(), "refused": "–"}.get(said, "✗"))
    return " ".join(signs)


def table(trainers: list[str], methods: list[str]) -> str:
    """The table, in Markdown; what went wrong goes to standard error."""
    lines = ["| trainer | " + " | ".join(TITLES[m] for m in methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for trainer in trainers:
        if importlib.util.find_spec(TRAINERS[trainer].needs) is None:
            print(f"{trainer}: {TRAINERS[trainer].needs} is not installed", file=sys.stderr)
            continue
        cells = []
        for method in methods:
            with contextlib.redirect_stdout(sys.stderr):
                results = cell(trainer, method)
            cells.append(mark(results))
            for what, said in results.items():
                if said not in ("yes", "refused"):
                    print(f"{trainer} {method} {what}: {said[:600]}", file=sys.stderr, flush=True)
        lines.append(f"| {TRAINERS[trainer].title} | " + " | ".join(cells) + " |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trainers", default=",".join(TRAINERS))
    parser.add_argument("--methods", default=",".join(METHODS))
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    print(table(options.trainers.split(","), options.methods.split(",")), end="")


if __name__ == "__main__":
    main()
