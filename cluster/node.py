"""Forwards to :mod:`cluster.slurm.task`, for jobs that version 0.1 queued. To be removed in version 0.3."""

from cluster.slurm.task import main

if __name__ == "__main__":
    main()
