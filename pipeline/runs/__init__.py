"""The run folder: its file names, checkpoints, metrics, evaluations, history of starts and lock."""
