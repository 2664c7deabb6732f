"""A video and an image by LiteLLM."""

import os
import time

import litellm

URL = os.environ["URL"] + "/v1"
server = {"api_base": URL, "api_key": "none", "custom_llm_provider": "openai"}
video = litellm.video_generation(prompt="a boat", model="openai/tiny", size="128x64", seconds="1", **server)
while video.status in ("queued", "in_progress"):
    time.sleep(0.1)
    video = litellm.video_status(video_id=video.id, **server)
if video.status != "completed":
    print(f"DIFFERENCE video_status: {video}")
if litellm.video_content(video_id=video.id, **server)[4:8] != b"ftyp":
    print("DIFFERENCE video_content: not an MP4 file")
listed = litellm.video_list(**server)
if not listed:
    print(f"DIFFERENCE video_list: {listed}")
image = litellm.image_generation(prompt="a boat", model="openai/tiny", size="128x64", api_base=URL, api_key="none")
if not image.data[0].b64_json:
    print(f"DIFFERENCE image_generation: {image}")
print("SUMMARY 5 calls")
