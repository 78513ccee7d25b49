"""The job behind `dynalora push`."""
