"""The job behind `dynalora chat`."""
