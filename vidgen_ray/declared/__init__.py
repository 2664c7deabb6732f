"""Declarations of diffusers pipelines: what a pipeline needs, which lengths and sizes it makes, its defaults and its licence.

Published names: `Declaration`, `read_declaration`, `shipped` (declaration.py) and `problems_of` (arguments.py). Importing this
package loads neither torch nor diffusers.
"""
