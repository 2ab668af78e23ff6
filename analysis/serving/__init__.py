"""Dynamic selection under load: what a study of serving shows, as tables and figures."""
