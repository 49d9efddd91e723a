"""The DeepSeek-V4 model as functions: activations and state views in, rows and logits out. Owns no state of its own."""
