"""The rendered world of 256 pixels, and the training of models on it. Not used by vidgen_ray.

It replaces the world of 128 pixels as soon as all models of the profile `demo` are trained on it. `weights` has those that are:
each training continues from there with `--init`. The order, each with `--out out/rendered/NAME`:

1. `autoencoder` to `vae`, `captioner`, `face_recogniser`
2. `flux`
"""
