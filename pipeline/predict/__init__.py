"""Running a trained student on page images and PDFs. Loading a bundle and predicting with it imports no torch."""

DEFAULT_THRESHOLD, DEFAULT_DPI = 0.3, 144.0
