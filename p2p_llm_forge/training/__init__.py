"""One run, from opening to model card: job, folder, set-up, saving, results."""
