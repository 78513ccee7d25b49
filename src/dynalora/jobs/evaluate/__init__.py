"""The job behind `dynalora evaluate`."""
