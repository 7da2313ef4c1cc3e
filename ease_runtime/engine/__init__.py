"""Which tokens run when, at which exit they leave, and what is chosen: schedule, run, commit."""
