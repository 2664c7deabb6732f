"""Data sets from output folders: scores, queries, comparisons and exports. The core never imports this package."""
