"""The output folder: files of a shot, the stage cache, the manifest. Nothing partial is ever visible."""
