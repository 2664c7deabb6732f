"""Training of the models of the profile `demo` on a synthetic drawn world, one program per model. Not used by vidgen_ray."""
