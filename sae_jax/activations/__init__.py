"""Arrays, files and datasets in, batches of tokens out, in one order."""
