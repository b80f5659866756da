"""COCO average precision of a detector, or of predictions in files."""
