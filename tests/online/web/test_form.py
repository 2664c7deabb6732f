"""The form in Chromium: values, images, variations, seed, more like this, keyboard."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

import httpx
import numpy as np
import pytest
from PIL import Image as PILImage
from pydantic import Field

from tests.conftest import ASTRONAUT
from tests.online.web.conftest import cards, generate, open_menu, playwright, with_fakes
from vidgen_ray.online import server_context
from vidgen_ray.online import serving_profile as serving
from vidgen_ray.online.store.jobs import JobKind
from vidgen_ray.online.web import form_controls
from vidgen_ray.online.web.form_controls import PLACED, control_groups
from vidgen_ray.online.web.pages import card_of
from vidgen_ray.profile import load_profile
from vidgen_ray.safety import Consent
from vidgen_ray.shot import DERIVED_FIELDS, Shot
from vidgen_ray.stages.svd import SVDStage

expect = playwright.expect
DROP = """([selector, name, bytes, type = "image/png"]) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], name, { type }));
  const target = document.querySelector(selector);
  for (const type of ["dragover", "drop"])
    target.dispatchEvent(new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true }));
}"""
PASTE = """([name, bytes, text]) => {
  const data = new DataTransfer();
  if (text) data.setData("text/plain", text);
  data.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
  const paste = new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true });
  return document.activeElement.dispatchEvent(paste);
}"""
"""Returns whether the browser pastes text itself."""


@pytest.fixture
def grey(tmp_path) -> str:
    file = tmp_path / "grey.png"
    PILImage.fromarray(np.full((64, 128, 3), 90, np.uint8)).save(file)
    return str(file)


def test_form_values_reach_the_job_its_card_and_the_form_of_another_job(site, open_page):
    site.director.paused.set()
    page = open_page(site.url)
    page.get_by_label("Photos").set_input_files(ASTRONAUT)
    expect(page.get_by_label("Use this photo")).to_be_checked()
    page.get_by_label("LoRA", exact=True).select_option("ink")
    page.get_by_label("LoRA weight").fill("0.5")
    page.get_by_role("button", name="Add LoRA").click()
    page.get_by_label("LoRA", exact=True).nth(1).select_option("wash")
    page.get_by_label("Style").fill("watercolour")
    page.get_by_text("Advanced:").click()
    page.get_by_label("Priority").select_option("high")
    page.get_by_label("Negative prompt").fill("blurry")
    group = page.get_by_role("group", name="Base image")
    group.get_by_label("Steps").fill("3")
    group.get_by_label("Guidance (CFG)").fill("4.5")
    page.get_by_role("group", name="Style", exact=True).get_by_label("Denoise strength").fill("0.25")
    page.get_by_role("group", name="Face").get_by_label("Pose").select_option("none")
    generate(page, "an astronaut\non a beach")
    card = cards(page, "queue")
    expect(card.locator(".status")).to_have_text("Reading the face (0 %)")
    expect(card.locator("[aria-current=step]")).to_have_text("Face")
    stages = [text.removesuffix(" (done)") for text in card.locator(".stages li").all_text_contents()]
    assert stages == ["Face", "Base image", "LoRA", "Style", "Likeness", "Video", "Clip likeness", "Upscale", "Save"]
    site.director.paused.clear()
    site.wait_for_jobs(1)
    card = cards(page, "clips")
    expect(card.locator("video")).to_be_visible()
    (job,) = site.jobs()
    shot = job.shot
    assert (job.priority, card_of(job.queued(), "", {}).status[-15:]) == ("high", ", high priority")
    assert (shot.prompt, shot.negative_prompt, shot.use_hunyuan_style) == ("an astronaut\non a beach", "blurry", True)
    assert (shot.steps.flux, shot.guidance.flux, shot.style_strength, shot.pose) == (3, 4.5, 0.25, "none")
    assert shot.steps.svd == 2, "the profile's default"
    assert [lora.weight for lora in shot.lora] == [0.5, 1]
    assert shot.face_image
    card.locator(".menu > summary").click()
    card.get_by_text("Settings of").click()
    settings = dict(zip(card.locator("dt").all_text_contents(), card.locator("dd").all_text_contents(), strict=True))
    assert (settings["Size"], settings["Drawn at"]) == ("256 × 128", "128 × 64, upscaled 2 times")
    assert settings["Seed"] == str(shot.seed)
    assert settings["Style"] == "watercolour"
    assert settings["Character"] == "from a photo"
    site.director.held.set()
    page.evaluate("window.same = true")
    page.get_by_label("Prompt", exact=True).fill("something else")
    card.get_by_role("link", name="More like this").click()
    prompt = page.get_by_label("Prompt", exact=True)
    expect(prompt).to_have_value(shot.prompt)
    expect(prompt).to_be_focused()
    expect(page.get_by_label("Seed")).to_have_value("")
    page.get_by_role("button", name="Generate").click()
    expect(cards(page, "queue")).to_have_count(1)
    assert page.evaluate("window.same"), "the page was reloaded"
    again = site.jobs()[0]
    assert again.shot.seed != shot.seed
    unlike = {"seed": 0, "id": None}
    assert again.shot.model_copy(update=unlike) == shot.model_copy(update=unlike)


def test_found_face_is_drawn_on_the_photo_and_frames_follow_the_video_model(new_site, tmp_path, open_page, grey):
    # The server checks photos with the trained face detector of this profile.
    site = new_site(pipeline=with_fakes("demo", tmp_path / "demo"))
    page = open_page(site.url)
    page.get_by_label("Photos").set_input_files(ASTRONAUT)
    expect(page.get_by_text("Face found", exact=True)).to_be_visible()
    box, photo = page.locator("#photo-tray rect.chosen"), page.locator("#photo-tray img")
    photo.evaluate("image => image.decode()")
    drawn, frame = box.bounding_box(), photo.bounding_box()
    # The face of this photo is in the upper middle.
    assert 0.25 < (drawn["x"] + drawn["width"] / 2 - frame["x"]) / frame["width"] < 0.65
    assert 0.05 < (drawn["y"] + drawn["height"] / 2 - frame["y"]) / frame["height"] < 0.5
    assert 0.1 < drawn["height"] / frame["height"] < 0.5
    page.get_by_label("Photos").set_input_files(grey)
    expect(page.locator("#photo-error")).to_have_text(re.compile(r"grey\.png: No face found; use a photo"))
    expect(page.get_by_label("Use this photo")).to_have_count(1)
    page.locator("#photo-tray").evaluate("tray => tray.replaceChildren()")
    with PILImage.open(ASTRONAUT) as photo:
        pair = PILImage.new("RGB", (2 * photo.width, photo.height))
        pair.paste(photo, (0, 0))
        pair.paste(photo.resize((photo.width * 3 // 4, photo.height * 3 // 4)), (photo.width, 0))
    pair.save(grey)
    page.get_by_label("Photos").set_input_files(grey)
    faces, index = page.locator("#photo-tray button"), page.locator("[name=face_index]")
    expect(faces.first).to_have_attribute("aria-pressed", "true")
    page.locator("#photo-tray rect").nth(1).click()
    expect(faces.nth(1)).to_have_attribute("aria-pressed", "true")
    expect(index).to_have_value("1")
    faces.first.click()
    expect(index).to_have_value("")
    page.get_by_text("Advanced:").click()
    model, frames = page.get_by_label("Video model"), page.get_by_label("Frames", exact=True)
    for chosen, length in (("wan", "9"), ("", "8")):
        model.select_option(chosen)
        expect(frames).to_have_value(length)
    frames.fill("13")
    model.select_option("wan")
    expect(frames).to_have_value("13")  # it was changed
    open_page.messages[:] = [text for text in open_page.messages if "400" not in text]


def test_photo_of_a_person_needs_a_consent_and_is_saved_as_character(site, open_page, tmp_path):
    photo = tmp_path / "me.png"
    PILImage.open(ASTRONAUT).resize((256, 256)).save(photo)
    site.director.paused.set()
    page = open_page(site.url)
    basis, person = page.get_by_label("I may use this person's likeness because"), page.get_by_label("Person", exact=True)
    saved = page.get_by_label("Saved character").locator("option:checked")
    for hidden in (basis, page.get_by_label("Saved character"), page.get_by_label("Save as character")):
        expect(hidden).to_be_hidden()
    page.get_by_label("Photos").set_input_files(photo)
    expect(page.get_by_label("Use this photo")).to_be_checked()
    generate(page, "a person")
    expect(page.locator("[id='consent.basis-error']")).to_have_text("Choose why this face may be used, and name the person.")
    expect(basis).to_be_focused()
    basis.select_option(label="this person agreed in writing")
    generate(page, "a person")
    expect(page.locator("[id='consent.subject-error']")).to_have_text("Got nothing, this field is required.")
    person.fill("Anna Ek")
    page.get_by_label("Document").fill("release-12.pdf")
    page.get_by_label("Save as character").fill("Anna")
    generate(page, "a person")
    expect(saved).to_have_text("Anna")
    expect(page.locator("#photo-tray img")).to_have_count(0)
    generate(page, "the saved character")
    expect(cards(page, "queue")).to_have_count(2)
    consent = Consent(subject="Anna Ek", basis="written", reference="release-12.pdf")
    second, first = site.jobs()
    assert [job.shot.consent for job in (second, first)] == [consent, consent]
    assert second.shot.face_image == first.shot.face_image
    page.get_by_role("button", name="Cancel a person").click()
    open_menu(page, "a person").get_by_role("link", name="Try again").click()
    expect(saved).to_have_text("Anna")
    open_page.messages[:] = [text for text in open_page.messages if "400" not in text]


def test_start_image_is_chosen_dropped_pasted_or_taken_from_a_clip(site, open_page, grey):
    page = open_page(site.url)
    fold = page.locator(".settings-fold")
    content = list(Path(grey).read_bytes())
    page.get_by_label("Start image").first.set_input_files(grey)
    expect(page.locator("#image-tray img")).to_have_count(1)
    page.locator("#image-tray input").uncheck()
    page.evaluate(DROP, ["[data-drop=image]", "phone.heic", content, "image/heic"])
    expect(page.locator("#image-error")).to_have_text("phone.heic: choose a JPEG, PNG or WebP image.")
    page.evaluate(DROP, ["[data-drop=image]", "dropped.png", content])
    expect(page.locator("#image-tray input")).to_be_checked()
    page.evaluate(DROP, ["[data-drop=photo]", "photo.png", content])
    expect(page.locator("#photo-error")).to_have_text(re.compile("photo.png: No face found"))
    page.locator("#image-tray input").uncheck()
    page.get_by_label("Prompt", exact=True).focus()
    # As Excel copies cells.
    assert page.evaluate(PASTE, ["cells.png", content, "text"])
    fold.evaluate("fold => { fold.open = false; }")
    assert not page.evaluate(PASTE, ["pasted.png", content])
    expect(page.locator("#image-tray input")).to_be_checked()
    expect(fold).to_have_attribute("open", "")
    generate(page, "pasted")
    site.wait_for_jobs(1)
    expect(page.locator("#clips video")).to_have_count(1)
    (pasted,) = site.jobs()
    assert Path(pasted.shot.image).read_bytes() == bytes(content)
    assert not pasted.shot.face_image
    card = open_menu(page, "pasted")
    card.get_by_text("Settings of").click()
    card.get_by_role("button", name="Use as start image").click()
    expect(page.locator("#announcements")).to_have_text("image.png: start image set")
    generate(page, "from a clip")
    site.wait_for_jobs(2)
    assert site.jobs()[0].shot.image not in (None, pasted.shot.image)
    open_page.messages[:] = [text for text in open_page.messages if "400" not in text]


def test_seed_is_random_until_it_is_locked_and_counts_up_in_variations(site, open_page):
    page = open_page(site.url)
    sizes = page.get_by_label("Size").locator("option").all_text_contents()
    assert sizes[:3] == ["256 × 128, default", "1280 × 720, 16:9", "1920 × 1080, 16:9"]
    lock, seed = page.locator("#lock-seed"), page.get_by_label("Seed")
    generate(page, "one")
    expect(seed).to_have_attribute("placeholder", re.compile(r"Random \(last: \d+\)"))
    first = site.jobs()[0].shot.seed
    lock.click()
    expect(lock).to_have_attribute("aria-pressed", "true")
    expect(seed).to_have_value(str(first))
    lock.click()
    expect(seed).to_have_value("")
    site.wait_for_jobs(1)
    card = open_menu(page, "one")
    card.get_by_text("Settings of").click()
    card.get_by_role("button", name="Use seed").click()
    expect(seed).to_have_value(str(first))
    expect(lock).to_have_text("Locked")
    page.get_by_label("Count").fill("3")
    page.get_by_label("Seed").fill("4294967295")
    page.get_by_label("Image", exact=True).check()
    expect(page.get_by_label("Frames", exact=True)).to_be_hidden()
    expect(page.locator("#size-hint")).to_have_text("An image of the default size has 128 × 64 pixels.")
    generate(page, "three images")
    site.wait_for_jobs(4)
    expect(page.locator("#clips .open img")).to_have_count(3)
    images = site.jobs()[:3]
    assert sorted(job.shot.seed for job in images) == [0, 1, 4294967295]
    drawn = {(job.kind, job.shot.generate_video, job.shot.width, job.shot.height) for job in images}
    assert drawn == {(JobKind.VIDEO, False, 128, 64)}


def test_clip_is_continued_with_its_last_frame(site, open_page, grey):
    first = site.add("walks to the door")
    # The director of a server keeps the last frame of every clip, this one only if another shot needs it. It then replaces the
    # files of the clip, so this comes before a page loads them.
    site.pipeline.generate_video("stops", continue_from=first.shot_id, seed=1, upscale_video=False, num_frames=2)
    page = open_page(site.url)
    open_menu(page, "walks to the door").get_by_role("link", name="Continue").click()
    source = page.get_by_label("Last frame of “walks to the door”")
    expect(source).to_be_checked()
    page.get_by_label("Image", exact=True).check()
    expect(source).to_be_hidden()
    page.get_by_label("Clip", exact=True).check()
    generate(page, "opens the door")
    site.wait_for_jobs(2)
    expect(page.locator("#clips video")).to_have_count(2)
    second = site.jobs()[0].shot
    assert (second.prompt, second.continue_from) == ("opens the door", first.id)
    assert Path(second.image).parent.name == first.shot_id
    page.get_by_label("Prompt", exact=True).fill("something else")
    open_menu(page, "opens the door").get_by_role("link", name="More like this").click()
    # The new form has arrived. Without this line the image could be put into the old one.
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("opens the door")
    expect(source).to_be_checked()
    page.get_by_label("Start image").set_input_files(grey)  # in place of the last frame
    expect(page.locator("#image-tray img")).to_have_count(1)
    expect(source).to_have_count(0)


def test_errors_are_shown_at_their_field(site, open_page, tmp_path):
    page = open_page(site.url)
    invalid_photo = tmp_path / "photo.jpg"
    invalid_photo.write_text("<script>alert(1)</script>")
    page.get_by_label("Photos").set_input_files(invalid_photo)
    expect(page.get_by_label("Photos")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#photo-error")).to_have_text(re.compile(r"^photo\.jpg: "))
    page.get_by_label("Style").fill("ink")
    page.get_by_label("Fast").check()
    generate(page, "a portrait")
    expect(page.locator("#style_prompt-error")).to_have_text(re.compile("Mode fast has no restyle"))
    expect(page.get_by_label("Style")).to_be_focused()
    expect(page.locator("#photo-error")).to_be_hidden()
    page.get_by_label("Style").fill("")
    page.locator("#create").evaluate("form => { form.noValidate = true; form.elements['steps.flux'].value = '0'; }")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("group", name="Base image").get_by_label("Steps")).to_be_focused()  # in a closed fold
    page.get_by_role("group", name="Base image").get_by_label("Steps").fill("")
    page.get_by_label("LoRA", exact=True).select_option("ink")
    page.get_by_label("LoRA weight").fill("9")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#lora-error")).to_have_text("Got 9, must be less than or equal to 2.")
    assert site.jobs() == []
    open_page.messages[:] = [text for text in open_page.messages if "400" not in text]


def test_clip_is_created_by_keyboard(site, open_page):
    page = open_page(site.url)
    focused = "document.activeElement"
    page.keyboard.press("Tab")
    assert page.evaluate(f"{focused}.textContent") == "Skip to the gallery"
    focus_order = []
    while (name := page.evaluate(f"{focused}.name || {focused}.id || {focused}.textContent.trim()")) != "Generate":
        focus_order.append(name)
        if name not in ("generate_video", "mode"):  # the ring is around the label
            ring = page.evaluate(
                f"(({{outlineStyle, outlineWidth}}) => [outlineStyle, outlineWidth])(getComputedStyle({focused}))"
            )
            assert ring == ["solid", "2px"], f"no focus ring on {name}"
        if name == "prompt":
            page.keyboard.type("by keyboard")
        if name == "mode":
            page.keyboard.press("ArrowRight")
        page.keyboard.press("Tab")
    assert focus_order == [
        "Skip to the gallery", "vidgen", "Usage", "API", "prompt", "generate_video", "mode", "Settings", "image", "photo",
        "lora", "style_prompt", "size", "num_frames", "fps", "seed", "lock-seed", "Advanced: upscaling, steps, guidance", "n",
    ]  # fmt: skip
    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.press("Control+Enter")
    site.wait_for_jobs(1)
    expect(page.locator("#clips video")).to_be_visible()
    job = site.jobs()[0]
    assert (job.shot.prompt, job.shot.mode) == ("by keyboard", "fast")


# The controls derived from stages: a new stage or field appears in the form without a change of the page.


class NewShot(Shot):
    """Shot with the fields of a stage that does not exist yet."""

    interpolate_factor: Literal[1, 2, 4] = Field(2, description="Frames made from one frame.")
    smoothness: float = Field(0.5, ge=0, le=1, description="Smoothness of the motion.")
    keep_edges: bool = Field(True, description="Keep sharp edges.")


class NewStage(SVDStage):
    name = "interpolate"
    label = "Smoothing"
    reads = ("interpolate_factor", "smoothness", "seed", "steps.svd")
    clip_only_fields = ("keep_edges",)


def test_new_stage_and_its_fields_appear_in_the_form(monkeypatch, new_site):
    monkeypatch.setattr(serving, "STAGES", (*serving.STAGES, NewStage))
    monkeypatch.setattr(form_controls, "Shot", NewShot)
    monkeypatch.setattr(server_context, "Shot", NewShot)
    served = serving.serving_profile(load_profile("tiny"))
    assert NewStage in served.stages
    html = httpx.get(new_site(served=served).url, timeout=60).text
    group = html.partition("<legend>Smoothing</legend>")[2].partition("</fieldset>")[0]
    assert 'name="interpolate_factor"' in group
    assert '<option value="4">4</option>' in group
    assert 'name="smoothness" type="number" inputmode="decimal" min="0" max="1" step="any" placeholder="0.5"' in group
    assert "Smoothness of the motion." in group
    assert '<option value="no">no</option>' in group
    assert "steps.svd" not in group, "a field of an earlier stage"


def test_every_field_that_a_served_stage_reads_has_a_control():
    served = serving.serving_profile(load_profile("tiny"))
    every = [control for _, controls in control_groups(served) for control in controls]
    names = {control.name for control in every}
    read = {field for stage in served.stages for field in (*stage.reads, *stage.identity_fields, *stage.clip_only_fields)}
    assert read - names - PLACED == set(DERIVED_FIELDS) - PLACED
    video = next(control for control in every if control.name == "video_model")
    assert video.choices == ("svd", "wan", "ltx")
    assert {"identity", "identity_strength", "min_identity", "max_tries", "upscaler"} <= names
    params = {name: each for name, each in served.params.items() if name == "flux"}
    ((label, controls),) = control_groups(replace(served, params=params))
    assert (label, [control.name for control in controls]) == ("Base image", ["steps.flux", "guidance.flux"])
