#!/bin/sh
# Decode every clip with ffmpeg, and compare what ffprobe says with what docs/outputs.md promises.
count=0
for clip in $(find "$FILES" "$ROOT/examples/people" -name '*.mp4'); do
    count=$((count + 1))
    name=$(echo "$clip" | sed "s#^$FILES/##;s#^$ROOT/##")
    problems=$(ffmpeg -v error -xerror -i "$clip" -map 0 -map -0:s -f null - 2>&1 | head -1) && [ -z "$problems" ] || echo "DIFFERENCE $name: $problems"
    found=$(ffprobe -v trace -select_streams v:0 -of csv=p=0 "$clip" 2>&1 -show_entries \
        stream=codec_name,pix_fmt,color_range,color_space,color_transfer,color_primaries |
        grep -o "^h264,.*\|type:'\(moov\|mdat\)'" | tr '\n' ' ')
    case "$found" in
    "type:'moov' type:'mdat' "*"h264,yuv420p,tv,bt709,bt709,bt709 ") ;;
    *) echo "DIFFERENCE $name: ffprobe: $found" ;;
    esac
done
echo "SUMMARY $count clips"
