"""The job behind `dynalora generate`."""
