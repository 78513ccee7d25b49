"""The job behind `dynalora landscape`."""
