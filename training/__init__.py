"""Training of the models of the profile `demo` on a synthetic drawn world, one program per model. Not used by vidgen_ray.

For example `python -m training.flux --out out/training/flux`. The same command resumes; `--init FOLDER --steps N --rate R`
continues from existing weights. The order, each with `--out out/training/NAME`:

1. `autoencoder` to `vae`, again with `--whole-steps 1300`, then with `--decoder-steps 1300`
2. `flux`, `face_recogniser` (to `recogniser`), `face_detector` (to `detector`), `infusenet`
3. `lora` to `ada.safetensors` with `--person ada`, and to `sketch.safetensors` with `--style sketch`
4. `svd`, `wan`, `wan_autoencoder`, `hunyuandit`, `classifier`
5. `python -m training.ship` copies the results into the package
"""
