"""How a small DeepSeek-V2 is taught: the lessons, the balance losses and the loop."""
