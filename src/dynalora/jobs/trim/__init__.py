"""The job behind `dynalora trim`."""
