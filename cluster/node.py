"""Forwards to :mod:`cluster.slurm.task`: jobs that version 0.1 queued call it by this name."""

from cluster.slurm.task import main

if __name__ == "__main__":
    main()
