"""Tables and figures of a study, made from ``results/`` alone: no torch, no account, no network."""
