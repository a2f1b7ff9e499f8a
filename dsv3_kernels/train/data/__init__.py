"""The text: read, tokenised, cut into windows in a seed's order."""
