"""COCO average precision of predictions, from files or from a detector."""
