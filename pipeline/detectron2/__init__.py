"""Import of detectron2's configs and checkpoints, and export of checkpoints. Works without detectron2."""
