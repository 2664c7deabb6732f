"""Data sets from output folders: scores, queries, comparisons and exports. The core never imports this package.

Read `tables.py` first: it says what a folder has. Then `scorers.py` and `score_folder.py`, which measure clips, `captions.py`,
`compare.py`, and `export.py`, which writes a data set: `export_rows.py` says which rows and splits it has, and
`export_formats.py` which files.
"""
