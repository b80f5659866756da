"""The teacher as a source of signals: live, or from an Arrow cache with an identity."""
