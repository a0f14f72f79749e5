"""Running a model over text to learn about its neurons."""
