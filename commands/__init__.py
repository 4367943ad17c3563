"""What people type: one file a script, and the picture of a run."""
