"""One frozen backbone in memory that serves: many tasks, and many speeds as the load changes."""
