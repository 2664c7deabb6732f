"""Stages that servers of other engines compute. Read video_server.py, then stages.py."""
