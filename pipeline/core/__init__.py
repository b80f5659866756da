"""Parts that every other package uses: files, locks, processes, ranks, progress, errors."""
