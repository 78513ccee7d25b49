"""Fine-tune a user's own model on the user's own data: the job behind `dynalora finetune`."""
