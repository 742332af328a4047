"""Looking at what a model did: plain functions from tokens, choices and logits to tables. No model, no widget."""
