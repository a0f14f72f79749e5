"""Speed under a RAM cap, each rung of a ladder of caps in a process of its own."""
