"""Where the pipeline runs: launchers for clusters. Nothing in ``pipeline`` or ``graphkd`` imports this package."""
