"""The run folder: its config, checkpoints, metrics, and the detector that a run trained."""
