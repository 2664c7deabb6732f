"""Decode and encode images and videos. Handles codecs and colour. Does not know shots, stages or the output folder.

Encoding is deterministic: with the same FFmpeg, the same pixels give the same bytes. All decoders return the same pixels.
PyAV is imported with the first video: most processes open none.
"""
