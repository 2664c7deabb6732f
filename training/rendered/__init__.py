"""The rendered world of 256 pixels: scenes as data, their drawing and their captions. Not used by vidgen_ray."""
