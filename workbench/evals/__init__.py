"""How a model is examined: questions kept apart from every training text, and graders."""
