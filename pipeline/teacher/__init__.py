"""The teacher of a student: its run, identity, statistics, and its signals as a live network."""
