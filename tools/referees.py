"""Run suites that others wrote against a server and files of this project, and write docs/conformance.md.

`tools/referee_suites/referees.yaml` lists the suites: packages with versions, the command, the lines of its output that are
differences, and those that are expected, with the reason. A difference that is not listed fails, as does a listed one that is
not found.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import yaml
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.dataset.conftest import make_folder, moving
from tests.online.directors import listening_on_a_port, local_server
from vidgen_ray.cli import main as vidgen
from vidgen_ray.online.server_settings import OnlineSettings
from vidgen_ray.online.serving_profile import serving_profile
from vidgen_ray.profile import ProvenanceSettings, load_profile
from vidgen_ray.provenance.signing import create_signing_key

ROOT = Path(__file__).resolve().parents[1]
SUITES = ROOT / "tools" / "referee_suites"
ENVIRONMENTS = ROOT / "out" / "referees"
PAGE = ROOT / "docs" / "conformance.md"
NODE = "node@24.21.0"
"""The package of Node.js that all npm suites run with: some need a newer one than Debian's."""
OF_THE_PROJECT = ("torch", "torchvision")
"""Packages of 3 GB that suites take from the environment of the project."""
TIMEOUT_S = 600
BUGS = ("last_id", "clip_end")


# Environments.


def install(name: str, suite: Mapping[str, Any]) -> Path:
    """Install the packages of a suite into a folder of its own, unless they are there. Return the folder."""
    folder, packages = ENVIRONMENTS / name, {kind: suite[kind] for kind in ("npm", "pip") if kind in suite}
    installed, wanted = folder / "installed.json", json.dumps(packages)
    if not installed.exists() or installed.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if "npm" in packages:
            if name != "node":
                install("node", {"npm": [NODE]})
            (folder / "package.json").write_text('{"private": true}')
            environment = {**os.environ, "PUPPETEER_SKIP_DOWNLOAD": "1"}
            words = ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error", "--save-exact", *packages["npm"]]
            subprocess.run(words, cwd=folder, env=environment, check=True)
        if "pip" in packages:
            uv, python = ROOT / ".venv" / "bin" / "uv", folder / "venv"
            without = folder / "of-the-project.txt"
            without.write_text("".join(f"{package}; python_version < '3'\n" for package in OF_THE_PROJECT))
            subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, python], check=True)
            subprocess.run(
                [uv, "pip", "install", "--quiet", "--overrides", without, "--python", python, *packages["pip"]], check=True
            )
            (own,) = python.glob("lib/*/site-packages")
            (theirs,) = (ROOT / ".venv").glob("lib/*/site-packages")
            (own / "of_the_project.pth").write_text(f"{theirs}\n")
        installed.write_text(wanted)
    for file in SUITES.iterdir():
        shutil.copy(file, folder)  # modules of Node.js are found beside the script that imports them
    return folder


# What is judged.


class WithoutLastId:
    """ASGI app whose lists have no `last_id`: a bug that suites have to find."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        held: list[Message] = []

        async def changed(message: Message) -> None:
            if message["type"] == "http.response.body":
                message["body"] = re.sub(rb'"last_id":("[^"]*"|null),', b"", message["body"])
            elif message["type"] == "http.response.start":
                kept = [(name, value) for name, value in message["headers"] if name != b"content-length"]
                held.append({**message, "headers": kept})
                return
            while held:
                await send(held.pop())
            await send(message)

        await self.app(scope, receive, changed if scope.get("path") in ("/v1/videos", "/v1/files", "/v1/batches") else send)


@contextlib.contextmanager
def server(work: Path, bug: str | None) -> Iterator[str]:
    """Start the API with its job store, and a director that draws noise in place of models. Files are signed. Yield the URL."""
    create_signing_key(work / "c2pa.pem", "Referees")
    profile = load_profile("tiny").with_provenance(ProvenanceSettings(c2pa_key=work / "c2pa.pem"))
    limits = {"requests_per_minute": 1_000_000, "open_jobs": 10_000, "pixel_frames": 1280 * 768 * 20}
    settings = OnlineSettings(profile="tiny", data=str(work / "data"), wait_s=60, max_queued=10_000, limits=limits)
    with local_server(profile, settings, served=serving_profile(profile)) as running:
        app = WithoutLastId(running.app) if bug == "last_id" else running.app
        with listening_on_a_port(app) as url:  # type: ignore[arg-type]  # any ASGI app
            yield url


def write_files(folder: Path, url: str, bug: str | None, data_sets: bool) -> None:
    """Write an image and clips of the server, a film with sound, and data sets in three formats."""
    folder.mkdir()
    with httpx.Client(base_url=f"{url}/v1", timeout=60) as client:
        body = {"prompt": "a boat", "size": "128x64", "num_frames": 8, "scale": 2}
        video = client.post("/videos", json=body).raise_for_status().json()
        while video["status"] != "completed":
            assert video["status"] in ("queued", "in_progress"), video
            time.sleep(0.05)
            video = client.get(f"/videos/{video['id']}").json()
        for variant, name in {"image": "image.png", "sd": "clip.mp4", "hd": "clip-hd.mp4"}.items():
            content = client.get(f"/videos/{video['id']}/content", params={"variant": variant}).raise_for_status().content
            (folder / name).write_bytes(content)
    shots = [({"id": f"shot-{number}", "prompt": f"shot {number}"}, moving(8, seed=number)) for number in range(6)]
    make_folder(folder / "rendered", shots)
    for kind in ("videofolder", "webdataset", "parquet") if data_sets else ():
        words = ["export", str(folder / "rendered"), str(folder / kind), "--format", kind, "--split", "train=0.5,val=0.5"]
        assert vidgen(words) == 0
    assert (
        vidgen(
            ["film", str(folder / "rendered"), "-o", str(folder / "film.mp4"), "--music", str(ROOT / "examples" / "sea.ogg")]
        )
        == 0
    )
    if bug == "clip_end":
        for path in (folder / "clip.mp4", *folder.glob("videofolder/*/shot-0.mp4")):
            content = path.read_bytes()
            path.unlink()  # a hard link
            path.write_bytes(content[: -len(content) // 3])


# Running and judging.


def differences(suite: Mapping[str, Any], folder: Path, environment: Mapping[str, str]) -> tuple[list[str], str]:
    """Run a suite. Return its differences, each once, and its summary."""
    tools = [folder / "venv" / "bin", folder / "node_modules" / ".bin", ENVIRONMENTS / "node" / "node_modules" / ".bin"]
    path = os.pathsep.join([*map(str, tools), environment["PATH"]])
    with (folder / "output.txt").open("w+b") as file:
        # A group of its own: servers that the command has started end with it.
        process = subprocess.Popen(
            ["/bin/sh", "-c", suite["command"]],
            cwd=folder,
            env={**environment, "PATH": path},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            file.write(f"\nDIFFERENCE still running after {TIMEOUT_S} s\n".encode())
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    output = (folder / "output.txt").read_text(errors="replace")
    output = re.sub(r"\x1b\[[0-9;]*m", "", output)
    pattern = re.compile(suite.get("difference", r"^DIFFERENCE (.*)$"), re.MULTILINE)
    found = [" ".join(" ".join(filter(None, match.groups())).split()) for match in pattern.finditer(output)]
    summary = re.search(suite["summary"], output, re.MULTILINE) if "summary" in suite else None
    if "summary" in suite and not summary:
        found.append(f"the suite did not run to its end, see {folder.relative_to(ROOT)}/output.txt")
    return sorted(set(found)), " ".join(summary.groups()) if summary else ""


def judge(suite: Mapping[str, Any], found: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return expected pattern -> its differences, and those that no pattern matches."""
    matched: dict[str, list[str]] = {each["match"]: [] for each in suite.get("expected", ())}
    unlisted = []
    for difference in found:
        pattern = next((each for each in matched if re.search(each, difference)), None)
        matched.get(pattern or "", unlisted).append(difference)
    return matched, unlisted


def write_page(suites: Mapping[str, Mapping[str, Any]], results: Mapping[str, tuple[dict[str, list[str]], str]]) -> None:
    rows, reasons, pipe = [], [], "\\|"
    for name, suite in suites.items():
        versions = ", ".join(sorted(suite.get("npm", []) + suite.get("pip", []))) or suite.get("version", "")
        lines = suite.get("command", "").replace("\\\n", "").strip().splitlines()
        command = "; ".join(" ".join(line.split()) for line in lines).replace("|", "\\|")
        if name not in results:
            rows.append(f"| {name} | {suite['judges']} | {versions} | | not run: {suite['not_run']} |")
            continue
        matched, summary = results[name]
        count = sum(map(len, matched.values()))
        result = f"{count} expected difference{'s' * (count != 1)}" if count else "no difference"
        rows.append(f"| {name} | {suite['judges']} | {versions} | `{command}` | {', '.join(filter(None, (summary, result)))} |")
        reasons += [
            f"| {name} | {len(matched[each['match']])} | `{each['match'].replace('|', pipe)}` | {each['reason']} |"
            for each in suite.get("expected", ())
        ]
    template = (SUITES / "page.md").read_text()
    PAGE.write_text(template.replace("ROWS", "\n".join(rows)).replace("REASONS", "\n".join(reasons)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="SUITE", help="suites to run. Default: all, and write the page.")
    parser.add_argument("--quick", action="store_true", help="run only those that take seconds; do not write the page.")
    parser.add_argument("--bug", choices=BUGS, help="break the server or a file; fail unless at least two suites find it.")
    arguments = parser.parse_args()
    suites: dict[str, dict[str, Any]] = yaml.safe_load((SUITES / "referees.yaml").read_text())
    if unknown := set(arguments.names) - suites.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}. Known: {', '.join(suites)}")
    chosen = [
        name
        for name, suite in suites.items()
        if "command" in suite
        and (not arguments.names or name in arguments.names)
        and (not arguments.quick or suite.get("quick"))
        and (not arguments.bug or arguments.bug in suite.get("finds", ()))
    ]
    results, failed, finders = {}, False, []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        with server(work, arguments.bug) as url:
            write_files(work / "files", url, arguments.bug, "data sets" in chosen)
            environment = {
                **os.environ,
                "URL": url,
                "FILES": str(work / "files"),
                "ROOT": str(ROOT),
                "HOME": str(work),
                "BIN": str(ROOT / ".venv" / "bin"),
            }
            for name in chosen:
                started = time.monotonic()
                try:
                    folder = install(name, suites[name])
                except (subprocess.CalledProcessError, OSError) as error:
                    print(f"{name}: not run, cannot be installed: {error}", flush=True)
                    failed |= not arguments.quick  # CI may have no registry
                    continue
                found, summary = differences(suites[name], folder, environment)
                matched, unlisted = judge(suites[name], found)
                # A suite that runs alone finds a server without the objects of the others.
                gone = [] if arguments.bug or arguments.names else [pattern for pattern, those in matched.items() if not those]
                results[name] = matched, summary
                finders += [name] if unlisted else []
                failed |= bool(unlisted or gone)
                counts = f"{sum(map(len, matched.values()))} expected, {len(unlisted)} unlisted differences"
                print(f"{name}: {summary} {counts}, {time.monotonic() - started:.0f} s", flush=True)
                for line in [*unlisted, *(f"expected, but not found: {pattern}" for pattern in gone)]:
                    print(f"  {line[:300]}", flush=True)
    if arguments.bug:
        print(f"{arguments.bug} is found by {', '.join(finders) or 'none'}")
        return int(len(finders) < 2)
    if not failed and len(results) == sum("command" in suite for suite in suites.values()):
        write_page(suites, results)
        print(f"written: {PAGE.relative_to(ROOT)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
