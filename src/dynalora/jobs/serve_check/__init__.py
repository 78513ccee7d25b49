"""The job behind `dynalora serve-check`."""
