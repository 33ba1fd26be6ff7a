"""The worker's side: the client of the servers."""
