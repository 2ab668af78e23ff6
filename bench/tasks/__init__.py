"""Tasks: GLUE, SQuAD, own files; their data, prompts, features and metrics. Importing this imports no torch."""
