"""ON THE NODE: entry, loop, callbacks."""
