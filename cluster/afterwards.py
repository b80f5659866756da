"""Forwards to :mod:`cluster.slurm.epilogue`, for jobs that version 0.1 queued. To be removed in version 0.3."""

from cluster.slurm.epilogue import main

if __name__ == "__main__":
    main()
