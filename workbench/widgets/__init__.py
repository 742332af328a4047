"""What is seen in a notebook: one .py and one or more .js per widget, no build step, nothing fetched from elsewhere."""
