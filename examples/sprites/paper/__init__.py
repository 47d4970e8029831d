"""The paper's tables in small: one frozen base, every row trained and judged alike (docs/paper.md)."""
