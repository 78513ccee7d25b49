"""The job behind `dynalora export`."""
