"""DisLoRA under TRL's DPOTrainer: the reference is the same model with the adapter disabled."""

import tiny
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import dynalora

pairs = {
    "prompt": [f"After {number} comes " for number in range(16)],
    "chosen": [f"{number + 1}." for number in range(16)],
    "rejected": ["nothing." for _ in range(16)],
}
trainer = DPOTrainer(
    tiny.causal_model(),
    args=DPOConfig(
        "out",
        max_steps=6,
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        max_length=48,
    ),
    train_dataset=Dataset.from_dict(pairs),
    processing_class=tiny.tokenizer(),
    peft_config=dynalora.DisloraConfig(r=4, target_modules="all-linear", warmup_steps=2, tsd_count=2),
)
trainer.train()

[report] = dynalora.state_report(trainer.model)
print(report)
assert report.step == 6
layers = [module for module in trainer.model.modules() if hasattr(module, "has_directions")]
assert all(layer.has_directions("default") for layer in layers), "task-specific directions were chosen"
