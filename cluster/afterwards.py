"""Forwards to :mod:`cluster.slurm.epilogue`: jobs that version 0.1 queued call it by this name."""

from cluster.slurm.epilogue import main

if __name__ == "__main__":
    main()
