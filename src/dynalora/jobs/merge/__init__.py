"""The job behind `dynalora merge`."""
