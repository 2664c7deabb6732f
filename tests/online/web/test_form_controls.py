"""The controls derived from stages: a new stage or field appears in the form without a change of the page."""

from dataclasses import replace
from typing import Literal

import httpx
import pytest
from pydantic import Field

from vidgen_ray.online import server_context
from vidgen_ray.online import serving_profile as serving
from vidgen_ray.online.web import form_controls
from vidgen_ray.online.web.form_controls import PLACED, control_groups
from vidgen_ray.profile import load_profile
from vidgen_ray.shot import DERIVED_FIELDS, Shot
from vidgen_ray.stages.svd import SVDStage


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


@pytest.fixture
def with_new_stage(monkeypatch) -> serving.ServingProfile:
    monkeypatch.setattr(serving, "STAGES", (*serving.STAGES, NewStage))
    monkeypatch.setattr(form_controls, "Shot", NewShot)
    monkeypatch.setattr(server_context, "Shot", NewShot)
    served = serving.serving_profile(load_profile("tiny"))
    assert NewStage in served.stages
    return served


def test_new_stage_and_its_fields_appear_in_the_form(with_new_stage, new_site):
    html = httpx.get(new_site(served=with_new_stage).url, timeout=60).text
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
    assert {"identity", "identity_strength", "min_identity", "retries", "upscaler"} <= names
    params = {name: each for name, each in served.params.items() if name == "flux"}
    ((label, controls),) = control_groups(replace(served, params=params))
    assert (label, [control.name for control in controls]) == ("Base image", ["steps.flux", "guidance.flux"])
