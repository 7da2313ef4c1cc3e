"""The bundle directory: what its manifest says, and what its graphs take and give."""
