"""The teacher cache: signals of a teacher precomputed into Arrow files, with an identity that readers check."""
