"""`dynalora export`: an adapter as a plain LoRA."""
