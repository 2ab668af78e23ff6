"""A sweep file to runs, and the runs to a machine."""
