"""One resident model that serves many speeds: loads, policies, the server itself and its simulation."""
