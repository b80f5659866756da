"""GraphKD: the method (graphs over region features) and the detectors that it distils.

Pure torch: nothing here reads files or knows of Ray. ``graphkd.method`` holds the graph and its losses,
``graphkd.detectors`` the detector interface with its adapters, ``graphkd.distill`` the step that joins them.
"""

__version__ = "0.1.0"
