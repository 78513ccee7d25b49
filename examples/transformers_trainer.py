"""DiRA under transformers' Trainer: nothing to add, the penalty's schedule follows the trainer's steps."""

import tiny
from peft import get_peft_model
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import dynalora

words = tiny.tokenizer()
model = get_peft_model(tiny.causal_model(), dynalora.DiraConfig(r=8, target_modules="all-linear"))
arguments = TrainingArguments(
    "out", max_steps=6, learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True
)
trainer = Trainer(
    model,
    arguments,
    train_dataset=[words(text, return_token_type_ids=False) for text in tiny.TEXTS],
    data_collator=DataCollatorForLanguageModeling(words, mlm=False),
)
trainer.train()

weights = [row["dira_penalty_weight"] for row in trainer.state.log_history if "dira_penalty_weight" in row]
print("weight of the penalty at every step:", weights)
assert weights == sorted(weights, reverse=True)
assert weights[0] > weights[-1], "it decays over the run"
assert dynalora.state_report(model)[0].step == 6
