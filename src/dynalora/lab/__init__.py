"""What jobs share: models, data, tasks, training, run folders, reports."""
