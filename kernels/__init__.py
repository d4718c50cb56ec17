"""Device code and its plain-PyTorch twins."""
