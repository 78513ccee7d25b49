"""The job behind `dynalora compact`."""
