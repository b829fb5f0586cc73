"""Long runs on real ranks: `make soak`."""
