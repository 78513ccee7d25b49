"""PE-DyRA under TRL's SFTTrainer: the configuration goes where a LoraConfig would."""

import tiny
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import dynalora

trainer = SFTTrainer(
    tiny.causal_model(),
    args=SFTConfig(
        "out",
        max_steps=6,
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        max_length=48,
    ),
    train_dataset=Dataset.from_dict({"text": tiny.TEXTS}),
    processing_class=tiny.tokenizer(),
    peft_config=dynalora.PedyraConfig(
        r=4, target_modules="all-linear", adjust_start=1, adjust_interval=1, adjust_end=5, adjust_size=4
    ),
)
trainer.train()

[report] = dynalora.state_report(trainer.model)
print("ranks:", report.ranks)
assert report.step == 6
assert len(set(report.ranks.values())) > 1, "ranks have moved"
assert sum(report.ranks.values()) == 4 * len(report.ranks), "and their total has not changed"
