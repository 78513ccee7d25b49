"""PE-DyRA on a sentence encoder: ``model.add_adapter``, without any PeftModel."""

import tempfile

import tiny
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

import dynalora

with tempfile.TemporaryDirectory() as folder:
    tiny.encoder().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    encoder = Transformer(folder)
model = SentenceTransformer(modules=[encoder, Pooling(32)], device="cpu")
model.add_adapter(
    dynalora.PedyraConfig(
        r=4, target_modules=["query", "value"], adjust_start=1, adjust_interval=1, adjust_end=5, adjust_size=4
    )
)
trainer = SentenceTransformerTrainer(
    model,
    SentenceTransformerTrainingArguments(
        "out", max_steps=6, learning_rate=1e-2, save_strategy="no", report_to=[], use_cpu=True
    ),
    train_dataset=Dataset.from_dict({"anchor": tiny.TEXTS, "positive": tiny.TEXTS[1:] + tiny.TEXTS[:1]}),
    loss=losses.MultipleNegativesRankingLoss(model),
)
trainer.train()

[report] = dynalora.state_report(model)
print("ranks:", report.ranks)
assert report.step == 6
assert len(set(report.ranks.values())) > 1, "ranks have moved"
