"""`dynalora landscape`: how much rank adapters use, side by side."""
