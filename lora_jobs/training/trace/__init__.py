"""What the real training code allocates, counted without a GPU: its own forward, backward and step on fake tensors."""
