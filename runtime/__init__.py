"""The lean runtime: NumPy and one inference backend. Importing it loads nothing."""
