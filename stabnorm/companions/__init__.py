"""What to watch beside the norms, opt-in: attention, weights, embedding and output. Import the module you need."""
