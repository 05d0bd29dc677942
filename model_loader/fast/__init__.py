"""The fast engine: Whisper's decoder step as one captured graph, with weights of 32, 16, 8 or 4 bits."""
