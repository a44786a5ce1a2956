"""The `pairmill` command and small tools: the only place where the parts are put together."""
