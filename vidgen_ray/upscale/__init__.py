"""Upscale video files, and keep sound, subtitles, chapters and times. Does not know Ray.

A video is cut into segments. Each is encoded to a file of its own, so that a killed run resumes, and segments can be made by
several workers or machines. Joining them copies packets.
"""
